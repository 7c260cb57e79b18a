"""Which store a place is; and a run whose store is a bucket that fails now and then."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.parameters import RunParameters
from flows.places import allowed_with
from rldecoder import open_run
from rldecoder.artifacts.opening import open_store, store_place
from rldecoder.artifacts.remote import RemoteStore
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError
from rldecoder.reporting import SilentReporter
from rldecoder.runner import run_pipeline
from tests.artifacts.s3_server import KEY, SECRET, Proxy
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "debug.yaml"


def settings(bucket: str, cache: Path) -> RunConfig:
    return load_run_config(CONFIG, [f"store={bucket}", f"s3.cache={cache}"])


def test_places(tmp_path: Path) -> None:
    assert store_place("artifacts") == Path("artifacts")
    assert store_place("s3://bucket-1/a/b") == "s3://bucket-1/a/b"
    assert type(open_store(tmp_path)) is ArtifactStore
    for wrong in (
        f"s3://{KEY}:{SECRET}@bucket-1/a",
        "s3://bucket-1/a?key=x",
        "gs://bucket/a",
        "s3://",
    ):
        with pytest.raises(BadInputError, match=r"A store is a folder, or s3://") as caught:
            open_store(wrong)
        assert SECRET not in str(caught.value)
        with pytest.raises(BadInputError, match="store") as caught:
            load_run_config(CONFIG, [f"store={wrong!r}"])
        assert SECRET not in str(caught.value)
    with pytest.raises(BadInputError, match="a bucket is shared already"):
        load_run_config(CONFIG, ["store=s3://bucket-1", "mirror=memory://x"])


def test_a_form_may_not_name_a_bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allowed = allowed_with([tmp_path])
    for name, value in allowed.as_env().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInputError, match=r"s3://elsewhere.* not one that a form may"):
        RunParameters(config="debug", store="s3://elsewhere").load()
    with pytest.raises(BadInputError, match="may not set store"):
        RunParameters(config="debug", overrides=["store=s3://elsewhere"]).load()
    # One that a config of the house names is the house's own.
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        CONFIG.read_text() + f"\nstore: s3://own-bucket/x\ns3: {{cache: {tmp_path}/c}}\n"
    )
    _, store = RunParameters(config=str(mine)).load()
    assert store.place == "s3://own-bucket/x"
    _, store = RunParameters(config=str(mine), store="s3://own-bucket/x").load()
    assert isinstance(store, RemoteStore)
    with pytest.raises(BadInputError, match="may not set"):
        RunParameters(config=str(mine), overrides=["s3.cache=/etc"]).load()


def test_a_run_through_a_server_that_fails(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    """Two stages of the debug run, a tenth of all requests spoiled; then another machine."""
    first = settings(bucket, tmp_path / "a")
    proxy.rates = {"error": 0.03, "drop": 0.02, "lost": 0.02, "truncate": 0.03}
    results = run_pipeline(
        first, store=open_run(first).store, report=SilentReporter(), until="ingest"
    )
    assert [result.reused for result in results] == [False, False]

    second = settings(bucket, tmp_path / "b")
    run = open_run(second)
    assert run.missing(["sync_tokenizer", "ingest"]) == []
    again = run_pipeline(second, store=run.store, report=SilentReporter(), until="ingest")
    assert [result.reused for result in again] == [True, True]
    assert [result.ref for result in again] == [result.ref for result in results]
    assert run.artifact("ingest").metrics == results[1].metrics
    assert sum(proxy.put_in.values()) >= 3

    # No key is in anything that was written.
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert KEY.encode() not in content
            assert SECRET.encode() not in content

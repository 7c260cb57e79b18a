"""Plans of whole runs, as they are shown; and where their speed comes from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from rldecoder import open_run
from rldecoder.cli.plan import show_plan, warn_of_disk
from rldecoder.cli.show import show_smoke
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.lm.user_cache import user_cache
from rldecoder.planning.throughput import MEASURED_FILE, PEAKS, measured, rate_for
from rldecoder.run import Run
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("own_cache", "large_disk")


@pytest.fixture
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terabyte is free: what is refused here does not depend on the machine of the test."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**12))


def opened(store: Path, *overrides: str, name: str = "debug") -> Run:
    return open_run(load_run_config(ROOT / "configs" / f"{name}.yaml", list(overrides)), store)


def shown(run: Run, *, device: str | None = None, as_json: bool = False) -> str:
    console = Console(record=True, width=80, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    try:
        show_plan(run, console, device=device, share=None, as_json=as_json)
    finally:
        text = console.export_text()
    return text


def test_what_is_there_is_not_to_do(debug_store: Path, tmp_path: Path) -> None:
    plan = json.loads(shown(opened(debug_store), as_json=True))
    assert [row["state"] for row in plan["stages"]] == ["here"] * 19
    assert plan["to_do"]["disk_bytes"] == plan["to_do"]["flops"] == 0

    run = opened(tmp_path / "store")
    (run.store.progress_path(run.refs["ingest"]) / "part").mkdir(parents=True)
    plan = json.loads(shown(run, as_json=True))
    assert [row["state"] for row in plan["stages"][:3]] == ["to do", "started", "to do"]
    rows = plan["stages"]
    assert plan["to_do"]["tokens"] == sum(row["tokens"] for row in rows)
    kept = sum(row["disk_bytes"] for row in rows)
    assert plan["to_do"]["disk_bytes"] == kept + max(row["scratch_bytes"] for row in rows)


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    text = shown(opened(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    assert "cache_activations  28.7 k" in text
    assert "?" in text  # nothing was measured here yet
    assert "to do, in all" in text


def test_a_disk_that_is_too_small_is_refused_with_the_reason(tmp_path: Path) -> None:
    much = [
        "ingest.budget_tokens.train=1000000000000",
        "cache_activations.budget_tokens.train=1000000000000",
    ]
    run = opened(tmp_path, *much)
    with pytest.raises(NoResourceError, match=r"too small for the run debug.*cache_activations is"):
        shown(run)
    console = Console(record=True, width=500)
    warn_of_disk(run, console)
    assert "too small" in console.export_text()
    quiet = Console(record=True, width=500)
    warn_of_disk(opened(tmp_path), quiet)
    assert quiet.export_text() == ""


def test_a_model_that_is_not_here_is_planned_by_its_spec(tmp_path: Path) -> None:
    """Its weights could not be loaded: they are on no disk of this machine."""
    few = [f"cache_activations.budget_tokens.{name}=1000" for name in ("train", "label")]
    run = opened(tmp_path, *few, name="scale")
    plan = json.loads(shown(run, device="h100", as_json=True))
    assert {row["state"] for row in plan["stages"]} == {"unknown"}
    assert "Meta-Llama-3-8B" in plan["why_unknown"]
    row = next(row for row in plan["stages"] if row["stage"] == "sync_tokenizer")
    assert row["disk_bytes"] == pytest.approx(16.06e9, rel=0.01)  # the published files
    flops = plan["to_do"]["flops"]
    assert plan["to_do"]["hours"] == pytest.approx(flops / (0.3 * 989e12) / 3600)
    with pytest.raises(BadInputError, match="sizes of google/nothing are not known"):
        shown(opened(tmp_path, "sync_tokenizer.model=google/nothing"))


def test_a_smoke_test_is_kept_and_planned_with(tmp_path: Path) -> None:
    assert rate_for("random", None, None) is None
    console = Console(record=True, width=200)
    show_smoke("random", console)
    (one,) = measured()
    assert (one.model, one.device) == ("random", "cpu")
    # 2 x parameters and attention: a tiny model's own count.
    assert 4e5 < one.flops_per_second / one.tokens_per_second < 8e5
    show_smoke("random", console)
    assert len(measured()) == 1  # the newest of a kind

    rate = rate_for("random", None, None)
    assert rate is not None
    plan = json.loads(shown(opened(tmp_path), as_json=True))
    assert plan["flops_per_second"] == rate.flops_per_second == measured()[0].flops_per_second
    assert plan["to_do"]["hours"] > 0
    other = rate_for("gpt2", None, None)
    assert other is not None
    assert "`rldecoder smoke gpt2` measures this one" in other.said

    (user_cache() / MEASURED_FILE).write_text("[1")
    assert measured() == []


def test_peaks_are_said_to_be_assumed() -> None:
    rate = rate_for("any", "h100", 0.4)
    assert rate is not None
    assert rate.flops_per_second == pytest.approx(0.4 * PEAKS["h100"].flops_per_second)
    assert "40% of h100" in rate.said
    assert "assumption" in rate.said
    for device, share in (("h1000", None), ("h100", 0.0), ("h100", 1.5), (None, 0.3)):
        with pytest.raises(BadInputError):
            rate_for("any", device, share)


def test_there_is_no_smoke_on_a_device_that_is_not_here() -> None:
    with pytest.raises(BadInputError, match="no device"):
        show_smoke("random", Console(), "tpu")

"""A release opened where its run's store is not: the same numbers, and nothing that was changed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from markupsafe import escape

from rldecoder import Release, open_release
from rldecoder.artifacts.catalogue import (
    CATALOGUE,
    FinalDecoder,
    ModelFolder,
    SupervisedDecoder,
    TrainedSae,
)
from rldecoder.artifacts.manifests import MANIFEST, FileEntry
from rldecoder.cli.serve import open_served
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.interp import records
from rldecoder.opened import EXPLAINING
from rldecoder.release.manifest import read_release, verify_release
from rldecoder.run import Run
from rldecoder.serve.app import make_app
from tests.forked import ForkServer
from tests.release.conftest import PROMPT, Released, reseal


@pytest.fixture(scope="module")
def release(released: Released) -> Release:
    return open_release(released.root)


def test_it_reads_what_the_run_reads(release: Release, run: Run) -> None:
    ours, theirs = release.read(PROMPT), run.read(PROMPT)
    assert ours.kl == theirs.kl
    table = ours.features(-1)
    assert list(table) == list(theirs.features(-1))
    latent = table[0].latent
    assert ours.ablate(latent, -1) == theirs.ablate(latent, -1)
    assert ours.amplify(latent, 2.0) == theirs.amplify(latent, 2.0)
    assert release.labels == run.labels
    assert release.explain(PROMPT).to_json() == run.explain(PROMPT).to_json()
    text = release.steer({latent: 4.0}).generate(PROMPT, max_new_tokens=4)
    assert text == run.steer({latent: 4.0}).generate(PROMPT, max_new_tokens=4)
    assert 'class="rldecoder"' in ours._repr_html_()
    assert release.decoder().frozen.sae is release.sae()


def test_a_notebook_shows_what_it_holds(release: Release) -> None:
    html = release._repr_html_()
    held = set(release.manifest.artifacts) - set(release.missing())
    assert all(f">{stage}<" in html for stage in held)
    assert ">ingest<" not in html
    for caveat in release.artifact(FinalDecoder).caveats:
        assert str(escape(caveat[:40])) in html


def test_its_artifacts_are_the_runs(release: Release, run: Run) -> None:
    for kind in (TrainedSae, FinalDecoder, SupervisedDecoder):
        ours, theirs = release.artifact(kind), run.artifact(kind)
        assert (ours.digest, ours.caveats) == (theirs.digest, theirs.caveats)
        assert ours.metrics == theirs.metrics
        assert ours.config == {name: theirs.config[name] for name in ours.config}
    assert release.artifact(SupervisedDecoder).load(release.lm(), release.sae())
    assert release.missing(EXPLAINING) == []
    assert len(release.missing()) == len(CATALOGUE) - len(release.manifest.artifacts) + 1
    assert "ingest" in release.missing()  # its digest is known, its text is not here
    with pytest.raises(BadInputError, match=r"does not hold what is needed.*cache_activations"):
        release.artifact("cache_activations")
    assert not ModelFolder.model.path(release.artifact(ModelFolder).folder).exists()


def test_another_process_in_another_folder_explains_the_same(
    forks: ForkServer, released: Released, run: Run, tmp_path: Path
) -> None:
    """The command, with a cache of its own: not even the model is taken from this one."""
    done = forks.run(
        "explain", "--json", "--release", str(released.root), PROMPT,
        cwd=tmp_path, env={"RLDECODER_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["run"] == "debug"
    assert said["artifacts"]["train_sae"] == run.refs["train_sae"].digest
    expected = json.loads(json.dumps(run.explain(PROMPT).to_json()))
    assert {name: said[name] for name in expected} == expected


def test_it_is_served(release: Release, tmp_path: Path) -> None:
    served = open_served(release, max_tokens=64, reviews=tmp_path / "reviews.jsonl")
    assert served.report is None
    client = TestClient(make_app(served, token="t"), base_url="http://127.0.0.1:8760")
    headers = {"x-rldecoder-token": "t", "origin": "http://127.0.0.1:8760"}
    page = client.get("/")
    assert page.status_code == 200
    answer = client.post("/api/trace", json={"prompt": PROMPT}, headers=headers)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["tokens"]) == len(release.read(PROMPT).tokens)
    assert client.get("/api/features").json()["all"] == len(release.labels)


def test_every_bit_counts(copied: Path) -> None:
    """In each file, the manifest included, and at every place: one after another."""
    names = [path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()]
    assert len(names) > 40
    for number, name in enumerate(names):
        file = copied / name
        content = file.read_bytes()
        spoilt = bytearray(content)
        spoilt[number * (len(content) - 1) // (len(names) - 1)] ^= 1 << number % 8
        for changed in (spoilt, content[:-1]):
            file.write_bytes(changed)
            with pytest.raises((DamagedFileError, BadInputError), match=re.escape(name)):
                verify_release(copied, read_release(copied))
        file.write_bytes(content)
    verify_release(copied, read_release(copied))


def test_only_what_was_released_may_lie_there(copied: Path, tmp_path: Path) -> None:
    def spoil(name: str) -> Path:
        path = copied / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def refused(name: str) -> None:
        with pytest.raises(DamagedFileError, match=name):
            open_release(copied)

    stranger = spoil("sae/extra.bin")
    stranger.write_bytes(b"x")
    refused("sae/extra.bin of the release cannot be trusted. It was never released")
    stranger.unlink()
    stranger.symlink_to(tmp_path)
    refused("never released")
    stranger.unlink()
    os.mkfifo(stranger)
    refused("never released")
    stranger.unlink()

    # What git and the hub keep there is never looked at.
    spoil(".git/config").write_text("x")
    spoil(".cache/huggingface/x").write_text("x")
    spoil(".gitattributes").write_text("x")
    open_release(copied)

    weights = copied / "sae" / "sae" / "sae_weights.safetensors"
    elsewhere = tmp_path / "weights"
    shutil.move(weights, elsewhere)
    refused("sae_weights.safetensors is missing")
    weights.symlink_to(elsewhere)  # even of the very same bytes
    refused("sae_weights.safetensors is missing or no plain file")
    weights.unlink()
    os.mkfifo(weights)
    refused("sae_weights.safetensors is missing or no plain file")


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/hosts.json", "sae/../../x.json", "a\\b.json", "x.pkl", "m.py"]
)
def test_names_lead_nowhere_else(copied: Path, name: str) -> None:
    files = read_release(copied).files
    reseal(copied, files={**files, name: FileEntry(size=1, sha256="0" * 64)})
    with pytest.raises(DamagedFileError, match="It names"):
        open_release(copied)


def test_a_newer_release_is_refused_by_name(copied: Path) -> None:
    before = (copied / MANIFEST).read_bytes()
    reseal(copied, schema_version=2, program="7.0.0")
    with pytest.raises(BadInputError, match=r"newer RL-Decoder \(7.0.0\).*release has schema 2"):
        open_release(copied)
    (copied / MANIFEST).write_bytes(before)
    reseal(copied, label_schema=records.SCHEMA_VERSION + 1)
    with pytest.raises(BadInputError, match="labels has schema"):
        open_release(copied)


def test_what_is_no_release_is_said_so(copied: Path, tmp_path: Path, run: Run) -> None:
    store_artifact = run.artifact(TrainedSae).folder
    for place, message in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path, f"has no {MANIFEST}"),
        (store_artifact, "is that of something else"),
    ):
        with pytest.raises(BadInputError, match=message):
            open_release(place)
    artifacts = dict(read_release(copied).artifacts)
    del artifacts["train_explainer"]
    reseal(copied, artifacts=artifacts)
    with pytest.raises(DamagedFileError, match="has no train_explainer"):
        open_release(copied)


def test_the_model_is_known_by_its_hashes(released: Released, run: Run, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run.artifact(ModelFolder).model, tmp_path / "called-anything"))
    assert open_release(released.root, model=own).lm().folder == own
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**settings, "layer_norm_epsilon": 1e-3}))
    with pytest.raises(BadInputError, match=r"is not random.*config.json says something else"):
        open_release(released.root, model=own).lm()
    with pytest.raises(BadInputError, match="The difference: no such folder"):
        open_release(released.root, model=tmp_path / "absent").read(PROMPT)

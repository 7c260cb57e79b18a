"""A run opened from Python: each artifact, model and label once, and what is missing, once said."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import rldecoder
from rldecoder import open_run
from rldecoder.artifacts.catalogue import Labels, TrainedSae
from rldecoder.cli import run as cli_run
from rldecoder.cli.export import ExportInputs
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.explain.steering import Changes
from rldecoder.opened import EXPLAINING
from rldecoder.run import Run
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "debug.yaml"
PROMPT = "The import statement finds a module and then"


def test_artifacts_are_found_by_name_and_by_class_and_kept(run: Run) -> None:
    sae = run.artifact("train_sae")
    assert isinstance(sae, TrainedSae)
    assert run.artifact(TrainedSae) is sae
    assert sae.digest == run.refs["train_sae"].digest
    assert run.inputs(ExportInputs).sae is sae
    assert run.missing() == []
    assert "19 of 19" in repr(run)
    with pytest.raises(BadInputError, match="no stage called train_sea"):
        run.artifact("train_sea")


def test_models_are_loaded_once_and_belong_together(run: Run) -> None:
    assert run.lm() is run.lm()
    assert run.sae() is run.sae()
    assert run.decoder() is run.decoder()
    assert run.decoder().frozen.lm is run.lm()
    assert run.decoder().frozen.sae is run.sae()
    reader = run.reader()
    assert (reader.lm, reader.sae, reader.decoder) == (run.lm(), run.sae(), run.decoder())
    assert reader.explainer is run.explainer()


def test_labels_are_found_by_latent(run: Run) -> None:
    features = run.artifact(Labels).labels.features
    assert list(run.labels) == [feature.latent for feature in features]
    assert run.labels[features[0].latent] is features[0]


def test_a_prompt_is_read_explained_and_steered(run: Run) -> None:
    reading = run.read(PROMPT)
    assert reading.tokens == tuple(
        run.lm().tokenizer.decode([token]) for token in run.lm().encode_prompt(PROMPT)
    )
    assert len(reading.predictions) == len(reading.kl) == len(reading.tokens)
    table = reading.features(-1)
    assert reading.ablate(table[0].latent, at=-1).decoder.effect == pytest.approx(
        table[0].effect, abs=1e-5
    )
    assert run.explain(PROMPT).to_json() == reading.explain(-1).to_json()
    steering = run.steer({table[0].latent: 4.0}, set={3: 9.0}, start=2)
    assert steering.changes == Changes({table[0].latent: 4.0}, {3: 9.0})
    text = steering.generate(PROMPT, max_new_tokens=8)
    assert text != run.steer().generate(PROMPT, max_new_tokens=8)
    assert run.steer().generate(PROMPT, model="decoder", max_new_tokens=8)


def test_what_is_missing_is_said_in_one_way(tmp_path: Path) -> None:
    run = open_run(load_run_config(CONFIG), tmp_path / "store")
    assert len(run.missing()) == 19
    assert run.missing(["train_sae", Labels]) == ["train_sae", "label_features"]
    assert "0 of 19" in repr(run)
    asked: dict[str, Any] = {
        "to explain.": lambda: run.read(PROMPT),
        "to export.": lambda: run.inputs(ExportInputs, "to export"),
        "enough.": lambda: run.artifact("label_features"),
        "yet so far.": lambda: run.require(EXPLAINING, "yet so far"),
    }
    for words, ask in asked.items():
        with pytest.raises(BadInputError) as caught:
            ask()
        assert caught.value.what.endswith(words)
        assert "label_features" in caught.value.why
        assert "rldecoder run CONFIG --until" in caught.value.mend
    with pytest.raises(BadInputError, match="--until train_explainer"):
        run.require(EXPLAINING)


def test_a_damaged_artifact_is_not_opened(debug_store: Path, tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path)
    source = open_run(CONFIG, debug_store).artifact(Labels)
    folder = run.store.path(run.refs[Labels.stage])
    folder.mkdir(parents=True)
    for file in source.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    labels = Labels.labels.path(folder)
    labels.write_bytes(labels.read_bytes().replace(b"label", b"lable", 1))
    with pytest.raises(DamagedFileError, match="not what was published"):
        run.artifact(Labels)


def test_an_sae_is_imported_without_what_it_does_not_need() -> None:
    code = (
        "import sys, rldecoder; rldecoder.__version__; print(*sys.modules)\n"
        "from rldecoder import Sae; Sae.load; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    alone, with_sae = (set(line.split()) for line in done.stdout.splitlines())
    assert not alone & {"torch", "numpy", "pydantic"}
    assert "torch" in with_sae
    assert not with_sae & {
        "transformers", "trl", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib",
        "fastapi", "prefect", "rich", "typer", "openai", "rldecoder.run",
    }  # fmt: skip


def test_public_names_are_those_that_are_listed() -> None:
    for name in rldecoder.__all__:
        assert getattr(rldecoder, name) is not None
        assert name in dir(rldecoder)
    assert rldecoder.Run is Run
    with pytest.raises(AttributeError, match="no attribute 'Say'"):
        rldecoder.Say  # noqa: B018


def test_prefect_is_found_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[EntryPoint] = []
    monkeypatch.setattr(cli_run, "entry_points", lambda **asked: offered)
    with pytest.raises(BadInputError, match="no Prefect runner"):
        cli_run.prefect_runner()
    group = "rldecoder.runners"
    offered.append(EntryPoint("prefect", "no_such_package.cli_run:run", group))
    with pytest.raises(BadInputError, match="cannot be loaded"):
        cli_run.prefect_runner()
    offered[0] = EntryPoint("prefect", "flows.cli_run:run_with_prefect", group)
    assert cli_run.prefect_runner().__module__ == "flows.cli_run"

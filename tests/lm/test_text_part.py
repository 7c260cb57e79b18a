"""Models of several media: the text part alone is loaded, whole, and is what it was as a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.loading import read_config
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.lm.text_part import PROVEN, text_part
from tests.lm.causal_architectures import has_text_part, tiny_config


@pytest.fixture(scope="module")
def whole_dir(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(tiny_config("gemma3"))
    with quiet_transformers():
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_lm_dir).save_pretrained(folder)
    return folder


def renamed(folder: Path, target: Path, old: str, new: str, **more: torch.Tensor) -> Path:
    """A copy whose weights have other names, and more of them."""
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace(old, new): tensor for name, tensor in weights.items()} | more
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_only_the_text_model_is_loaded(whole_dir: Path) -> None:
    lm = FrozenLM.load(whole_dir)
    assert type(lm.model).__name__ == "Gemma3ForCausalLM"
    assert lm.model.config.model_type == "gemma3_text"
    assert lm.context_length == 128


def test_names_of_older_checkpoints_are_known(whole_dir: Path, tmp_path: Path) -> None:
    lm = FrozenLM.load(whole_dir)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for number, other in enumerate(("model.language_model.", "language_model.")):
        folder = renamed(whole_dir, tmp_path / str(number), "language_model.model.", other)
        again = FrozenLM.load(folder)
        assert torch.equal(again.resid_and_final(ids, 2)[0], lm.resid_and_final(ids, 2)[0])


def test_all_of_the_text_model_must_be_there(whole_dir: Path, tmp_path: Path) -> None:
    lost = renamed(
        whole_dir, tmp_path / "lost", "language_model.model.layers.1.", "visual.layers.1."
    )
    with pytest.raises(
        BadInputError, match=r"architecture has and the files have not.*layers\.1\."
    ):
        FrozenLM.load(lost)
    extra = {"language_model.model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}
    more = renamed(whole_dir, tmp_path / "more", "", "", **extra)
    with pytest.raises(BadInputError, match=r"files have and its architecture has not.*layers\.7"):
        FrozenLM.load(more)


def test_what_is_not_proven_is_refused(whole_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rldecoder.lm.text_part.PROVEN", frozenset())
    with pytest.raises(BadInputError, match=r"'gemma3' are not supported.*not proven"):
        text_part(read_config(whole_dir))


def test_what_no_causal_model_reads_is_refused_before_a_weight_is() -> None:
    for kind, said in (("evolla", "knows no such type"), ("blt", "names no number of blocks")):
        with pytest.raises(BadInputError, match=rf"'{kind}' are not supported.*{said}"):
            text_part(AutoConfig.for_model(kind))


def test_each_proven_type_is_one_that_transformers_has() -> None:
    assert all(map(has_text_part, PROVEN))

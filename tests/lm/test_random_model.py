"""Random models: real folders, reproducible bytes, lossless tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rldecoder.errors import BadInputError
from rldecoder.lm.random_model import make_random_model


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_same_arguments_same_bytes_and_another_seed_other_weights(
    tmp_path: Path, architecture: str
) -> None:
    first, again, other = (
        make_random_model(tmp_path / name, architecture=architecture, seed=seed)  # type: ignore[arg-type]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert (first / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    weights = "model.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()


def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    folder = make_random_model(
        tmp_path / "m", n_layer=3, d_model=32, n_head=2, vocab_size=300, n_positions=64
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head) == (3, 32, 2)
    assert (config.vocab_size, config.n_positions) == (300, 64)
    assert len(tokenizer) == 300
    assert next(model.parameters()).dtype == torch.float32
    text = "def f():\n\treturn 'ünïcödé 🙂'"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # the merges are used


def test_predictions_are_far_from_uniform(tiny_lm_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_dir)
    with torch.no_grad():
        logits = model(torch.arange(64)[None]).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert entropy < torch.log(torch.tensor(512.0)) - 0.3


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_random_model(tmp_path / "m", n_layer=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_layer": 0}, "must be positive"),
        ({"d_model": 30, "n_head": 4}, "does not divide"),
        ({"vocab_size": 256}, "at least 257"),
        ({"vocab_size": 1_000_000}, "were learnt"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        make_random_model(tmp_path / "m", **sizes)  # type: ignore[arg-type]

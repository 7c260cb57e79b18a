"""All weights are there, and finite, or the model is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rldecoder.errors import BadInputError, NumericalError
from rldecoder.lm.frozen import FrozenLM

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def untied(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, change: Callable[[Weights], Weights]) -> Path:
    shutil.copytree(folder, target)
    tensors = change(load_file(target / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def under(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: t for name, t in weights.items() if part not in name}


ABSENT: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "no head": (without("lm_head"), "1 that its architecture has .* lm_head.weight"),
    "no block": (without(".layers.1."), r"model\.layers\.1\..* and 6 more"),
    "no embedding": (without("embed_tokens"), "model.embed_tokens.weight"),
    "compiled": (under("_orig_mod."), "_orig_mod."),
    "parallel": (under("module."), "module."),
    "peft": (under("base_model.model."), "base_model.model."),
    "base model": (
        lambda weights: {
            name.removeprefix("model."): tensor
            for name, tensor in weights.items()
            if name != "lm_head.weight"
        },
        "lm_head.weight",
    ),
    "adapter": (
        lambda weights: {**weights, "model.layers.0.mlp.up_proj.lora_A": torch.zeros(2, 2)},
        "1 that the files have .* model.layers.0.mlp.up_proj.lora_A",
    ),
    "narrower": (
        lambda weights: {
            **weights, "model.layers.2.mlp.up_proj.weight": torch.zeros(24, 32),
        },
        r"another shape: model.layers.2.mlp.up_proj.weight \(\[24, 32\] in the file, \[48, 32\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", ABSENT)
def test_weights_that_are_not_all_there_are_named(
    untied: Path, tmp_path: Path, damage: str
) -> None:
    change, named = ABSENT[damage]
    folder = changed(untied, tmp_path / "model", change)
    with pytest.raises(BadInputError, match=named) as caught:
        FrozenLM.load(folder)
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(("depth", "block"), [(4, 3), (2, 2)])
def test_config_of_another_depth_is_refused(
    untied: Path, tmp_path: Path, depth: int, block: int
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(untied, folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": depth}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match=rf"model\.layers\.{block}\."):
        FrozenLM.load(folder)


def test_half_of_a_sharded_checkpoint_is_refused(untied: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(untied)
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    AutoTokenizer.from_pretrained(untied).save_pretrained(tmp_path / "model")
    FrozenLM.load(tmp_path / "model")
    # The index of a copy that lost its last shard, and knows nothing of it.
    file = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != last}
    file.write_text(json.dumps(index))
    (tmp_path / "model" / last).unlink()
    with pytest.raises(BadInputError, match="its architecture has and the files have not"):
        FrozenLM.load(tmp_path / "model")


def test_what_needs_no_weight_of_its_own_is_no_fault(
    tiny_llama_dir: Path, tiny_lm_dir: Path, tmp_path: Path
) -> None:
    # Heads tied to the embeddings, a base model without prefix, and old causal-mask buffers.
    assert not any("lm_head" in name for name in load_file(tiny_llama_dir / "model.safetensors"))
    FrozenLM.load(tiny_llama_dir)

    def old(weights: Weights) -> Weights:
        bare = {name.removeprefix("transformer."): t for name, t in weights.items()}
        return bare | {f"h.{n}.attn.bias": torch.ones(1, 1, 4, 4) for n in range(4)}

    before = FrozenLM.load(tiny_lm_dir)
    after = FrozenLM.load(changed(tiny_lm_dir, tmp_path / "old", old))
    ids = torch.arange(1, 9)[None]
    assert torch.equal(before.trunk(ids, 4).resid, after.trunk(ids, 4).resid)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(untied: Path, tmp_path: Path, value: float) -> None:
    def spoil(weights: Weights) -> Weights:
        # A token that no probe reads: only a look at all weights finds it.
        weights["model.embed_tokens.weight"][509, 3] = value
        return weights

    folder = changed(untied, tmp_path / "model", spoil)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(NumericalError, match=r"NaN or infinity: model\.embed_tokens\.weight"):
            FrozenLM.load(folder, dtype=dtype)


def test_weights_too_large_for_the_dtype_are_named(untied: Path, tmp_path: Path) -> None:
    def enlarge(weights: Weights) -> Weights:
        weights["model.norm.weight"][0] = 1e6
        return weights

    folder = changed(untied, tmp_path / "model", enlarge)
    with pytest.raises(NumericalError, match=r"model\.norm\.weight"):
        FrozenLM.load(folder, dtype=torch.float16)

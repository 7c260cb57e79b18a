"""Single changed positions beside the model's own pass over the whole sequence with that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rldecoder.lm.ablation import PlaceReader
from rldecoder.lm.frozen import FrozenLM
from tests.lm.causal_architectures import DEPTH, LENGTH, tiny_config

AT_ONCE = (
    "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "gpt2, inverse", "gptj", "granite",
    "llama", "mixtral", "olmo2", "phi3", "qwen2, windows", "smollm3",
)  # fmt: skip
# Whose attention knows where it is by counting, not from the mask.
AS_SEQUENCES = ("bloom", "gpt_neo")
POSITIONS = torch.tensor([0, 1, 5, 6, 7, 7, 13, 20, LENGTH - 1])


def tiny(name: str, folder: Path) -> FrozenLM:
    torch.manual_seed(0)
    config = tiny_config(name)
    if name == "gpt_neo":
        config.window_size = 6
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return FrozenLM(model, AutoTokenizer.from_pretrained(folder), folder)


@torch.no_grad()
def whole(lm: FrozenLM, ids: Tensor, layer: int, position: int, resid: Tensor) -> Tensor:
    """[V] logits of the model's own forward pass with one residual replaced by a hook."""

    def change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[0, position] = resid
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    handle = lm.part_after(layer).register_forward_pre_hook(change, with_kwargs=True)
    try:
        return lm.model(input_ids=ids, use_cache=False).logits[0, position].float()
    finally:
        handle.remove()


@pytest.mark.parametrize("name", AT_ONCE + AS_SEQUENCES)
def test_a_changed_position_is_that_of_the_whole_sequence(name: str, tiny_lm_dir: Path) -> None:
    lm = tiny(name, tiny_lm_dir)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, lm.vocab_size, (1, LENGTH), generator=generator)
    for layer in (0, 2, DEPTH):
        resid = lm.trunk(ids, layer).resid[0]
        reader = PlaceReader(lm, layer)
        text = reader.sequence(resid)
        removed = torch.randn(len(POSITIONS), resid.shape[1], generator=generator)
        found = text.logprobs(text.without(removed, POSITIONS), POSITIONS)
        for row, (place, less) in enumerate(zip(POSITIONS.tolist(), removed, strict=True)):
            expected = whole(lm, ids, layer, place, resid[place] - less).log_softmax(-1)
            torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            lm.unembed(text.final), lm.model(input_ids=ids).logits[0].float(), atol=1e-4, rtol=1e-4
        )
        if layer < DEPTH:
            assert (reader.slow_because is None) == (name in AT_ONCE), reader.slow_because


def test_sequences_and_variants_do_not_touch_each_other(tiny_lm_dir: Path) -> None:
    lm = tiny("qwen2, windows", tiny_lm_dir)
    reader = PlaceReader(lm, 2)
    first, second = torch.randn(2, LENGTH, lm.d_model, generator=torch.Generator().manual_seed(0))
    text, other = reader.sequence(first), reader.sequence(second[:9])
    place = torch.tensor([8, 8, 3])
    variants = second[:3]
    alone = text.hidden(variants[1:2], place[1:2])
    other.hidden(variants, place)
    again = text.hidden(variants, place)
    torch.testing.assert_close(again[1:2], alone, atol=1e-5, rtol=1e-5)
    # What comes later in the sequence is not seen.
    shorter = reader.sequence(first[:9]).hidden(variants, place)
    torch.testing.assert_close(again, shorter, atol=1e-5, rtol=1e-5)


def test_variants_are_differentiable(tiny_lm_dir: Path) -> None:
    lm = tiny("gemma2", tiny_lm_dir)
    text = PlaceReader(lm, 2).sequence(torch.randn(LENGTH, lm.d_model))
    place = torch.tensor([10])
    resid = text.resid[place].clone().requires_grad_()
    (slope,) = torch.autograd.grad(text.logprobs(resid, place)[0, 7], resid)
    step = 1e-2 * slope / slope.norm()
    with torch.no_grad():
        up, down = (text.logprobs(resid + sign * step, place)[0, 7] for sign in (1, -1))
    assert float((up - down) / 2) == pytest.approx(float(slope.norm()) * 1e-2, rel=0.02)


def test_a_wrong_mask_is_noticed(tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama", tiny_lm_dir)
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    resid = torch.randn(LENGTH, lm.d_model, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([12])
    expected = PlaceReader(lm, 2).sequence(resid).hidden(resid[:1], place)
    # A mask that shows one position too few.
    monkeypatch.setattr(
        "rldecoder.lm.ablation.allowed_by", lambda *_: everything.tril().index_fill(
            1, torch.tensor([3]), False)
    )  # fmt: skip
    reader = PlaceReader(lm, 2)
    found = reader.sequence(resid).hidden(resid[:1], place)
    assert reader.slow_because is not None
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

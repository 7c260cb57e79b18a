"""Exact effects in the frozen model, against its own forward pass with a hooked residual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain import frozen_effects
from rldecoder.explain.pairs import Pairs
from rldecoder.explain.patching import noise_floor
from rldecoder.explain.positions import join_positions, positions_from_prompts
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.seeds import torch_generator
from tests.explain.conftest import HOOK_LAYER, split_tokens, text_positions


@torch.no_grad()
def whole(lm: FrozenLM, ids: Tensor, position: int, removed: Tensor | None) -> Tensor:
    """[V] log-probabilities of the model's own pass over a whole text, one residual changed."""

    def change(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        if removed is not None:
            hidden[0, position] -= removed
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    door = lm.part_after(HOOK_LAYER)
    handle = door.register_forward_pre_hook(change, with_kwargs=True)
    try:
        return lm.model(input_ids=ids[None], use_cache=False).logits[0, position].log_softmax(-1)
    finally:
        handle.remove()


def test_effects_equal_whole_texts(lm: FrozenLM, sae: Sae, pairs: dict[str, Pairs]) -> None:
    found = pairs["label"]
    tokens = split_tokens("label")
    for row in range(0, 60, 7):
        ids = tokens[int(found.positions.seq_id[row])]
        place = int(found.positions.pos[row])
        before = whole(lm, ids, place, None)
        token = int(found.candidates.tokens[row])
        # The cache is in bfloat16: text and effects are those of its residuals, to its rounding.
        assert float(before[token]) == pytest.approx(float(before.max()), abs=0.05)
        directions = found.candidates.acts[row, :, None] * sae.W_dec[found.candidates.indices[row]]
        for slot in (0, 7):
            after = whole(lm, ids, place, directions[slot])
            expected = float((before - after)[token])
            assert float(found.measured.single[row, slot]) == pytest.approx(expected, abs=0.02)
        after = whole(lm, ids, place, found.removals[row, 1] @ directions)
        assert float(found.measured.joint[row, 1]) == pytest.approx(
            float((before - after)[token]), abs=0.05
        )


def test_effects_at_the_end_of_prompts_are_exact(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM
) -> None:
    prompts = ["The hat is in the", "One and two", "a b"]
    positions = positions_from_prompts(decoder, prompts, "mine")
    places = positions.frozen_places
    candidates = frozen_effects.find_candidates(decoder, places, 6)
    removals = torch.rand(3, 2, 6, generator=torch_generator(0))
    found = frozen_effects.measure(decoder.frozen, places, candidates, removals)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor(lm.encode_prompt(prompt))
        before = whole(lm, ids, len(ids) - 1, None)
        token = int(before.argmax())
        assert int(candidates.tokens[row]) == token
        assert float(candidates.logprobs[row]) == pytest.approx(float(before[token]), abs=1e-4)
        directions = candidates.acts[row, :, None] * sae.W_dec[candidates.indices[row]]
        changes = [*directions, *(removals[row] @ directions)]
        after = torch.stack([whole(lm, ids, len(ids) - 1, change) for change in changes])
        mine = after[:, token]
        expected = before[token] - mine
        torch.testing.assert_close(found.single[row], expected[:6], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(found.joint[row], expected[6:], atol=2e-4, rtol=1e-3)
        others = torch.cat([after[:, :token], after[:, token + 1 :]], dim=1).amax(-1)
        lead = (mine - others)[6:]
        torch.testing.assert_close(found.margins[row], lead, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("rows", [5, 256])
def test_patched_runs_equal_measured_effects(
    decoder: SaeDecoderForCausalLM,
    pairs: dict[str, Pairs],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
) -> None:
    test = pairs["test"]
    monkeypatch.setattr(frozen_effects, "ROWS_AT_ONCE", rows)
    slots = test.candidates.indices[:, :, None] == test.positions.latents.indices[:, None]
    shares = torch.einsum("nmc,nck->nmk", test.removals, slots.float())
    places = test.positions.frozen_places
    found = frozen_effects.run_patched(decoder.frozen, places, shares, test.candidates)
    torch.testing.assert_close(found.effects, test.measured.joint, atol=1e-4, rtol=1e-3)
    assert torch.equal(found.changed, test.measured.margins < 0)
    assert 0.05 < float(found.changed.float().mean()) < 0.95
    chosen = torch.tensor([3, 40, 41])
    part = frozen_effects.run_patched(
        decoder.frozen, places.of(chosen), shares[chosen],
        test.candidates._replace(
            tokens=test.candidates.tokens[chosen], logprobs=test.candidates.logprobs[chosen]
        ),
    )  # fmt: skip
    torch.testing.assert_close(part.effects, found.effects[chosen], atol=1e-4, rtol=1e-3)


def test_attributions_are_the_derivative_of_the_effects(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    found = pairs["label"]
    share = 0.01
    removals = share * torch.eye(8).expand(60, -1, -1)
    places = found.positions.frozen_places
    small = frozen_effects.measure(decoder.frozen, places, found.candidates, removals).joint
    torch.testing.assert_close(small / share, found.candidates.attributions, atol=0.03, rtol=0.05)


def test_candidates_are_active_and_have_the_largest_attributions(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    found = pairs["label"]
    latents = found.positions.latents
    places = found.positions.frozen_places
    everything = frozen_effects.find_candidates(decoder, places, 12, probes=0)
    expected = everything.attributions.abs().sort(-1, descending=True).values[:, :8]
    torch.testing.assert_close(found.candidates.attributions.abs(), expected, atol=1e-5, rtol=1e-3)
    active = (latents.indices[:, :, None] == found.candidates.indices[:, None]).any(1)
    assert bool(active.all())
    assert float(everything.sensitivity[:, 1].max()) == 0.0


def test_noise_floor_is_what_random_directions_do(
    decoder: SaeDecoderForCausalLM, cache: Path
) -> None:
    positions = text_positions(decoder, cache, "label", 12)
    places = positions.frozen_places
    candidates = frozen_effects.find_candidates(decoder, places, 4, probes=32)
    sae = decoder.frozen.sae
    rows = sae.W_dec.norm(dim=-1)[candidates.indices]
    floor, norms = noise_floor(candidates, rows), rows * candidates.acts
    exceeded = []
    for here, read in frozen_effects.text_by_text(decoder.frozen, places, 256):
        lot = torch.randn(len(here), 4, 40, 64, generator=torch_generator(0, str(here[0])))
        lot = lot / lot.norm(dim=-1, keepdim=True) * norms[here][..., None, None]
        position = places.texts.position[here].repeat_interleave(160)
        after = read.logprobs(read.without(lot.flatten(0, 2), position), position)
        token = candidates.tokens[here].repeat_interleave(160)
        effect = candidates.logprobs[here].repeat_interleave(160) - after[range(len(token)), token]
        exceeded.append(effect.abs().view(len(here), 4, 40) > floor[here][..., None])
    assert 0.01 < float(torch.cat(exceeded).float().mean()) < 0.12


def test_joined_positions_are_each_in_their_own_text(
    decoder: SaeDecoderForCausalLM, cache: Path
) -> None:
    text = text_positions(decoder, cache, "label", 9)
    prompts = positions_from_prompts(decoder, ["One and two", "a b"], "mine")
    joined = join_positions([text, prompts])
    expected = [
        frozen_effects.find_candidates(decoder, part.frozen_places, 4, probes=0)
        for part in (text, prompts)
    ]
    found = frozen_effects.find_candidates(decoder, joined.frozen_places, 4, probes=0)
    torch.testing.assert_close(
        found.attributions, torch.cat([part.attributions for part in expected]),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    kept = joined.of(slice(4, 11))
    assert kept.source == joined.source[4:11]
    again = frozen_effects.find_candidates(decoder, kept.frozen_places, 4, probes=0)
    torch.testing.assert_close(again.logprobs, found.logprobs[4:11], atol=1e-5, rtol=1e-4)

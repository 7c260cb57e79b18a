"""The pointer model: a set function that cannot invent a feature, learns, and round-trips."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.explain.explainer import Explainer, Pointers, Slots, losses, make_slots
from rldecoder.explain.pairs import Pairs


def slots_of(explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: Pairs) -> Slots:
    return make_slots(explainer, decoder, pairs.candidates)


def test_permuting_candidates_permutes_the_output(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    for head in (explainer.pointer_head, explainer.effect_head):
        torch.nn.init.normal_(head.weight)
    slots = slots_of(explainer, decoder, pairs["label"])
    order = torch.randperm(8)
    permuted = Slots(*(column[:, order] for column in slots))
    expected, found = explainer(slots), explainer(permuted)
    for name in Pointers._fields:
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name)[:, order], atol=1e-4, rtol=1e-4
        )


def test_claims_point_only_to_active_features(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    torch.nn.init.normal_(explainer.pointer_head.weight)
    torch.nn.init.constant_(explainer.gate_bias, 50.0)
    candidates = pairs["label"].candidates
    acts = candidates.acts.clone()
    acts[:, 5:] = 0
    acts[0] = 0
    slots = make_slots(explainer, decoder, candidates._replace(acts=acts))
    pointers = explainer(slots._replace(noise=torch.zeros_like(acts)))
    chosen = explainer.choose(pointers)
    assert bool(torch.isfinite(pointers.effects).all())
    assert not bool(chosen[:, 5:].any())
    assert not bool(chosen[0].any())
    assert chosen[1:].sum(-1).unique().tolist() == [3]


def test_claims_below_the_noise_are_not_made(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    torch.nn.init.constant_(explainer.gate_bias, 50.0)
    pointers = explainer(slots_of(explainer, decoder, pairs["label"]))
    size = pointers.effects.abs()
    least = float(size.detach().median())
    explainer.spec = explainer.spec.model_copy(update={"min_effect": least, "max_claims": 8})
    expected = (size > least) & (size > pointers.noise)
    assert torch.equal(explainer.choose(pointers), expected)
    assert 0 < int(expected.sum()) < int((size > least).sum())


def test_gates_close_claims_unless_they_have_no_say(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    pointers = explainer(slots_of(explainer, decoder, pairs["label"]))
    pointers = pointers._replace(noise=torch.zeros_like(pointers.noise))
    shut = pointers._replace(gates=torch.zeros_like(pointers.gates))
    wide = pointers._replace(gates=torch.ones_like(pointers.gates))
    assert not bool(explainer.choose(shut).any())
    assert torch.equal(explainer.choose(shut, gated=False), explainer.choose(wide))
    assert explainer.choose(wide).sum(-1).unique().tolist() == [3]


def test_reconstructor_reads_the_claims_alone(explainer: Explainer) -> None:
    for layer in explainer.reconstructor.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight)
    claimed = torch.tensor([[1.0, 0.0, 1.0]])
    removals = torch.ones(1, 2, 3)
    removals[0, 1, 0] = 0
    effects = torch.tensor([[0.5, 3.0, -1.0]])
    other = torch.tensor([[0.5, -9.0, -1.0]])
    logprobs = torch.tensor([-1.0])
    explainer.requires_grad_(False)
    first = explainer.reconstructor(claimed, effects, removals, logprobs)
    again = explainer.reconstructor(claimed, other, removals, logprobs)
    torch.testing.assert_close(first, again)
    for values in first:
        assert float(values[0, 0]) != pytest.approx(float(values[0, 1]))


def test_untrained_reconstructor_adds_up_the_claims(explainer: Explainer) -> None:
    predicted = explainer.reconstructor(
        torch.tensor([[1.0, 0.0, 1.0]]),
        torch.tensor([[0.5, 3.0, -1.0]]),
        torch.tensor([[[1.0, 1.0, 1.0], [0.5, 1.0, 0.0]]]),
        torch.tensor([-1.0]),
    )
    assert predicted.effects.tolist() == [[-0.5, 0.25]]
    # log odds of a change: effect - log p - log 2
    expected = torch.tensor([[0.5, 1.25]]) - math.log(2)
    torch.testing.assert_close(predicted.change.detach(), expected)


def test_training_lowers_the_errors_and_helps_on_new_positions(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    def total(split: str) -> torch.Tensor:
        found = pairs[split]
        parts = losses(
            explainer,
            slots_of(explainer, decoder, found),
            found.candidates.logprobs,
            found.measured.single,
            found.removals,
            found.measured.joint,
            found.measured.margins < 0,
        )
        return torch.stack([parts.pointer, parts.effect, parts.reconstruction, parts.outcome])

    before, before_new = total("label").detach(), total("test").detach()
    optimizer = torch.optim.AdamW(explainer.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        total("label").sum().backward()
        optimizer.step()
    after, after_new = total("label").detach(), total("test").detach()
    # The pointer term starts at the first-order estimate, which is hard to beat here.
    assert bool((after[1:] < before[1:]).all()), (before, after)
    assert float(after_new.sum()) < 0.9 * float(before_new.sum())


def test_length_penalty_shortens_explanations(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    slots = slots_of(explainer, decoder, pairs["label"])
    before = explainer(slots).gates.sum()
    optimizer = torch.optim.AdamW(explainer.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        explainer(slots).gates.sum().backward()
        optimizer.step()
    assert float(explainer(slots).gates.sum().detach()) < float(before.detach())


def test_save_and_load(
    explainer: Explainer,
    decoder: SaeDecoderForCausalLM,
    pairs: dict[str, Pairs],
    tmp_path: Path,
) -> None:
    explainer.scales.uniform_()
    explainer.save(tmp_path)
    loaded = Explainer.load(tmp_path)
    assert loaded.spec == explainer.spec
    before = explainer(slots_of(explainer, decoder, pairs["test"]))
    after = loaded(slots_of(loaded, decoder, pairs["test"]))
    torch.testing.assert_close(after.effects, before.effects, atol=0, rtol=0)
    (tmp_path / "explainer.safetensors").write_bytes(b"junk")
    with pytest.raises(DamagedFileError):
        Explainer.load(tmp_path)
    with pytest.raises(BadInputError):
        Explainer.load(tmp_path / "nowhere")


def test_without_the_regulariser_the_reconstructor_learns_and_the_claims_do_not_hear_of_it(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    torch.nn.init.constant_(explainer.gate_bias, 1.0)
    explainer.spec = explainer.spec.model_copy(update={"min_effect": 0.0})
    found = pairs["label"]
    slots = slots_of(explainer, decoder, found)
    slots = slots._replace(noise=torch.zeros_like(slots.noise))

    def gradients(regularised: bool) -> tuple[float, float]:
        explainer.zero_grad(set_to_none=True)
        losses(
            explainer, slots, found.candidates.logprobs, found.measured.single, found.removals,
            found.measured.joint, found.measured.margins < 0, regularised=regularised,
        ).outcome.backward()  # fmt: skip
        gate, reader = explainer.gate_bias.grad, explainer.reconstructor.correction.bias.grad
        return (0.0 if gate is None else float(gate.abs())), float(reader.abs().sum())

    (shaped, read), (silent, read_too) = gradients(True), gradients(False)
    assert shaped > 0
    assert silent == 0
    assert read == read_too > 0

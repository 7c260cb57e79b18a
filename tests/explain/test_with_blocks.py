"""Explanations of a decoder that looks back, against plain reruns of whole sequences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.explain import patching
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.interpretability import DELETION_KS, deletion_scores
from rldecoder.explain.pairs import Pairs, make_pairs
from rldecoder.explain.positions import join_positions, positions_from_prompts
from rldecoder.explain.reading import PromptReader
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SparseLatents
from rldecoder.seeds import torch_generator
from tests.explain.conftest import SETTINGS, text_positions

PROMPTS = ["The hat is in the", "One and two", "a b"]
PROMPT = "The cat sat on the mat and looked"


@pytest.fixture(scope="module")
def with_blocks(lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
    made = new_decoder(lm, sae, [2, 3])
    made.blocks.copy_from(lm.base)
    with torch.no_grad():
        made.W.copy_(sae.W_dec)
        made.b.normal_(generator=torch_generator(1))
        made.blocks.sinks.normal_(generator=torch_generator(2))
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def blocks_pairs(with_blocks: SaeDecoderForCausalLM, cache: Path) -> Pairs:
    """40 positions of text and the ends of 3 prompts."""
    positions = join_positions(
        [
            text_positions(with_blocks, cache, "label", 40),
            positions_from_prompts(with_blocks, PROMPTS, "mine"),
        ]
    )
    return make_pairs(with_blocks, positions, SETTINGS)


@pytest.fixture(scope="module")
def texts(
    with_blocks: SaeDecoderForCausalLM, cache: Path, blocks_pairs: Pairs
) -> list[tuple[SparseLatents, int]]:
    """Each position's whole text [1, T, K], read independently of `Past`, and its place in it."""
    whole: dict[int, SparseLatents] = {}
    (batch,) = ActivationReader(cache, "label").ordered(1000, columns=("resid",))
    assert batch.resid is not None
    for seq in range(8):
        rows = batch.seq_id == seq
        assert batch.pos[rows].tolist() == list(range(1, 24))
        found = with_blocks.frozen.sae.encode(batch.resid[rows].float())
        pad = torch.zeros(1, found.acts.shape[1])
        whole[seq] = SparseLatents(
            torch.cat([pad, found.acts])[None], torch.cat([pad.long(), found.indices])[None]
        )
    positions = blocks_pairs.positions
    made = [
        (whole[seq], pos)
        for seq, pos in zip(positions.seq_id.tolist(), positions.pos.tolist(), strict=True)
        if seq >= 0
    ]
    for prompt in PROMPTS:
        latents = with_blocks.features(
            torch.tensor([with_blocks.frozen.lm.tokenizer.encode(prompt)])
        ).latents
        made.append((latents, latents.acts.shape[1] - 1))
    assert len(made) == 43
    return made


def logits_with(
    decoder: SaeDecoderForCausalLM, text: tuple[SparseLatents, int], shares: dict[int, float]
) -> Tensor:
    """[V]: logits of the place when activations there are reduced by shares."""
    latents, place = text
    acts = latents.acts.clone()
    for slot, latent in enumerate(latents.indices[0, place].tolist()):
        acts[0, place, slot] *= 1 - shares.get(latent, 0.0)
    return decoder.logits(SparseLatents(acts, latents.indices))[0, place]


ROWS = [*range(0, 40, 6), 40, 41, 42]


def test_the_decoders_effects_equal_reruns(
    with_blocks: SaeDecoderForCausalLM,
    blocks_pairs: Pairs,
    texts: list[tuple[SparseLatents, int]],
) -> None:
    found = blocks_pairs
    named, tokens = found.candidates.indices[:, [0, 7]], found.candidates.tokens
    effects = patching.decoder_effects(with_blocks, found.positions.places, tokens, named)
    for row in ROWS:
        token = int(tokens[row])
        before = logits_with(with_blocks, texts[row], {}).log_softmax(-1)
        for slot, latent in enumerate(named[row].tolist()):
            after = logits_with(with_blocks, texts[row], {latent: 1.0}).log_softmax(-1)
            expected = float((before - after)[token])
            assert float(effects[row, slot]) == pytest.approx(expected, abs=2e-4)


def test_attributions_are_the_derivative_of_the_effects(
    with_blocks: SaeDecoderForCausalLM,
    blocks_pairs: Pairs,
    texts: list[tuple[SparseLatents, int]],
) -> None:
    places = blocks_pairs.positions.places
    found = patching.decoder_attributions(with_blocks, places)
    for row in ROWS:
        before = logits_with(with_blocks, texts[row], {}).log_softmax(-1)
        for slot in (0, 3):
            latent = int(places.latents.indices[row, slot])
            after = logits_with(with_blocks, texts[row], {latent: 0.02}).log_softmax(-1)
            small = float((before - after)[before.argmax()]) / 0.02
            assert float(found[row, slot]) == pytest.approx(small, abs=0.03, rel=0.05)


def test_contributions_are_the_decoders_direct_way(
    with_blocks: SaeDecoderForCausalLM, blocks_pairs: Pairs
) -> None:
    candidates = blocks_pairs.candidates
    toward = with_blocks.frozen.lm.choice_directions(candidates.tokens)
    direct = with_blocks.direct(candidates.indices.flatten()).view(*candidates.indices.shape, -1)
    expected = candidates.acts * (direct * toward[:, None]).sum(-1)
    torch.testing.assert_close(candidates.contributions, expected, atol=1e-4, rtol=1e-3)


def test_deletion_equals_reruns(
    with_blocks: SaeDecoderForCausalLM,
    blocks_pairs: Pairs,
    texts: list[tuple[SparseLatents, int]],
) -> None:
    places = blocks_pairs.positions.places
    order = torch.rand(places.latents.acts.shape, generator=torch_generator(5)).argsort(-1)
    found = deletion_scores(with_blocks, places, order)
    for row in ROWS[::3]:
        p = logits_with(with_blocks, texts[row], {}).softmax(-1)
        token, k = int(p.argmax()), DELETION_KS[1]
        named = places.latents.indices[row][order[row, :k]].tolist()
        after = logits_with(with_blocks, texts[row], dict.fromkeys(named, 1.0)).softmax(-1)
        assert float(found["comprehensiveness"][row, 1]) == pytest.approx(
            float((p - after)[token]), abs=1e-4
        )


@pytest.fixture
def prompts(
    with_blocks: SaeDecoderForCausalLM, explainer: Explainer, monkeypatch: pytest.MonkeyPatch
) -> PromptReader:
    monkeypatch.setattr(
        "rldecoder.explain.explainer.noise_floor",
        lambda candidates, _: torch.zeros_like(candidates.acts),
    )
    explainer.heads.bias.data[1] = 50.0  # sure of everything
    labels = {latent: LabelText(f"label {latent}", 0.5) for latent in range(160)}
    return PromptReader(
        with_blocks.frozen.lm, with_blocks.frozen.sae, with_blocks, labels, explainer
    )


def test_claims_of_a_prompt_are_tested_by_reruns(
    with_blocks: SaeDecoderForCausalLM, prompts: PromptReader
) -> None:
    found = prompts.explain(PROMPT)
    ids = torch.tensor([with_blocks.frozen.lm.tokenizer.encode(PROMPT)])
    text = (with_blocks.features(ids).latents, ids.shape[1] - 1)
    before = logits_with(with_blocks, text, {}).log_softmax(-1)
    assert found.decoder.token_id == int(before.argmax())
    assert found.claims
    for checked in found.claims:
        after = logits_with(with_blocks, text, {checked.claim.latent: 1.0}).log_softmax(-1)
        expected = float((before - after)[found.frozen.token_id])
        assert checked.decoder_effect == pytest.approx(expected, abs=2e-4)
    assert found.sanity is not None


def test_a_reading_measures_by_reruns_and_shows_later_predictions_move(
    with_blocks: SaeDecoderForCausalLM, prompts: PromptReader
) -> None:
    reading = prompts.read(PROMPT)
    ids = reading.ids
    latents = with_blocks.features(torch.tensor([ids])).latents
    logits = with_blocks.logits(latents)[0]
    trace = reading.predictions
    assert [t.decoder[0].token_id for t in trace] == logits.argmax(-1).tolist()
    place = len(ids) - 3
    detail = reading.features(place)
    text = (latents, place)
    before = logits[place].log_softmax(-1)
    assert detail.token.token_id == int(before.argmax())
    chosen = detail[0]
    latent = chosen.latent
    after = logits_with(with_blocks, text, {latent: 1.0}).log_softmax(-1)
    assert chosen.effect == pytest.approx(float((before - after)[detail.token.token_id]), abs=2e-4)
    found = reading.ablate(latent, place)
    acts = latents.acts.clone()
    acts[0, place] *= latents.indices[0, place] != latent
    moved = with_blocks.logits(SparseLatents(acts, latents.indices))[0, place:].log_softmax(-1)
    kept = logits[place:].log_softmax(-1)
    expected = (kept.exp() * (kept - moved)).sum(-1).tolist()
    assert found.decoder.moved == pytest.approx(expected, abs=2e-4)
    assert len(found.decoder.moved) == 3
    assert found.decoder.moved[2] > 0
    assert all(prompts.row_effects(latent, 3))

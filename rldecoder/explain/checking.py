"""Explaining one prediction: both models' choices, Method A, and Method B's claims, each tested.

Axes: T position, K active latents, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import last_of_text
from rldecoder.explain.claims import CheckedClaim, Claim, explanation_text, judge
from rldecoder.explain.explainer import Explainer, make_slots
from rldecoder.explain.explanation import Explanation, Prediction, Sanity
from rldecoder.explain.frozen_effects import FrozenPlaces, TextReader, find_candidates, measure
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.patching import decoder_effects
from rldecoder.explain.prompts import token_text
from rldecoder.explain.ranking import rank_active, ranking_text
from rldecoder.explain.texts import last_of
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import SparseLatents

TOP_TOKENS = 3


class TextStates(NamedTuple):
    """A text as the frozen model has read it: its residuals are enough for everything else."""

    tokens: tuple[str, ...]
    """Raw text of each token."""
    resid: Tensor
    """[T, D] at the hook layer."""
    final: Tensor
    """[T, D], the final hidden states."""
    latents: SparseLatents
    """[T, K]"""

    def until(self, end: int) -> TextStates:
        """The first `end` tokens: what comes later, no earlier position has seen."""
        return TextStates(
            self.tokens[:end], self.resid[:end], self.final[:end], self.latents.of(slice(end))
        )


@torch.no_grad()
def explain_last(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    labels: Mapping[int, LabelText],
    text: TextStates,
    prompt: str,
) -> Explanation:
    """Explain the frozen model's next token after a text; every claim is tested in it.

    Args:
        prompt: what to show as the text.
    """
    lm = decoder.frozen.lm
    acts, indices = text.latents.of(-1)
    frozen = lm.unembed(text.final[-1]).log_softmax(-1)
    mine = decoder.logits(text.latents.of(None))[0, -1].log_softmax(-1)
    ranked = rank_active(acts, indices, explainer.scales, labels)
    claims, sanity = _checked_claims(decoder, explainer, labels, text)
    expected = _prediction(lm, frozen)
    return Explanation(
        prompt=prompt,
        tokens=text.tokens,
        frozen=expected,
        decoder=_prediction(lm, mine),
        kl=float((frozen.exp() * (frozen - mine)).sum()),
        method_a=ranking_text(ranked),
        ranked=tuple(ranked),
        claims=claims,
        method_b=explanation_text(
            expected.token, expected.probability, [checked.claim for checked in claims]
        ),
        sanity=sanity,
    )


def _prediction(lm: FrozenLM, logprobs: Tensor) -> Prediction:
    best = logprobs.topk(TOP_TOKENS)
    top = tuple(
        (token_text(lm, token), p)
        for token, p in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    )
    return Prediction(top[0][0], int(best.indices[0]), top[0][1], top)


def _checked_claims(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    labels: Mapping[int, LabelText],
    text: TextStates,
) -> tuple[tuple[CheckedClaim, ...], Sanity | None]:
    """Method B at the last position, its claims tested in the frozen model."""
    here = FrozenPlaces(text.latents.of(slice(-1, None)), last_of(text.resid))
    reader = TextReader(decoder.frozen)
    candidates = find_candidates(decoder, here, explainer.spec.max_candidates, reader=reader)
    pointers = explainer(make_slots(explainer, decoder.frozen.sae, candidates))
    chosen = explainer.choose(pointers)[0]
    if not bool(chosen.any()):
        return (), None

    # The claimed features, those that matter most first; as many that no claim names beside them.
    slots = pointers.logits[0].masked_fill(~chosen, float("-inf")).argsort(descending=True)
    slots = slots[: int(chosen.sum())]
    ordered = torch.arange(len(chosen), device=chosen.device)
    others = ordered[~chosen & (candidates.acts[0] > 0)][: len(slots)]
    removals = torch.zeros(1, 2, len(chosen), device=chosen.device)
    removals[0, 0, slots], removals[0, 1, others] = 1.0, 1.0
    measured = measure(decoder.frozen, here, candidates, removals, reader)
    named = candidates.indices[:, slots]
    on_decoder = decoder_effects(decoder, last_of_text(text.latents), candidates.tokens, named)[0]

    token = token_text(decoder.frozen.lm, int(candidates.tokens[0]))
    checked = []
    for slot, latent, decoder_effect in zip(
        slots.tolist(), named[0].tolist(), on_decoder.tolist(), strict=True
    ):
        predicted, effect = float(pointers.effects[0, slot]), float(measured.single[0, slot])
        position = _evidence(text.latents, latent)
        label = labels.get(latent, LabelText(None, None))
        claim = Claim(
            latent=latent,
            label=label.quoted,
            label_confidence=label.confidence,
            description=None if label.quoted is not None else label.description,
            evidence_position=position,
            evidence_text=text.tokens[position],
            direction="supports" if predicted > 0 else "opposes",
            strength=abs(predicted),
            output_token=token,
            probability=float(candidates.logprobs[0].exp()),
            noise=max(float(pointers.noise[0, slot]), explainer.spec.min_effect),
            sure=float(pointers.sure[0, slot].sigmoid()),
        )
        verdict = judge(predicted, effect, claim.noise)
        checked.append(CheckedClaim(claim, effect, verdict, decoder_effect))
    claimed, rest = measured.joint[0].tolist()
    return tuple(checked), Sanity(claimed, float(pointers.effects[0, slots].sum()), rest)


def _evidence(latents: SparseLatents, latent: int) -> int:
    """The position where a latent is most active; 0, the attention sink, is left out."""
    acts = (latents.acts * (latents.indices == latent)).sum(-1)
    return int(acts[1:].argmax()) + 1

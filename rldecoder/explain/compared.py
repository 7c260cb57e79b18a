"""Two prompts side by side: which features differ, and which predictions.

Axes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rldecoder.explain.prompts import token_text
from rldecoder.explain.ranking import RankedFeature
from rldecoder.explain.read_records import Shift
from rldecoder.lm.frozen import FrozenLM

if TYPE_CHECKING:
    from rldecoder.explain.reading import Reading

TOP_TOKENS = 5


class FeatureDifference(NamedTuple):
    """A feature that is active at one of two places, or at both."""

    latent: int
    label: str | None
    """None where there is none that may be quoted."""
    activation: float
    """At the first place, in the SAE's units; 0: not active."""
    other_activation: float
    """At the second."""
    difference: float
    """Second less first, as a share of the latent's usual high (p99 on the label split); where it
    was never seen, of the larger of the two."""
    confidence: float | None
    """Of the label, quoted or not."""
    unsure_label: str | None
    """A label below the bar of confidence: a guess, to be shown as one."""
    description: str | None = None
    """What is known of a latent without a label that may be quoted."""


class Predictions(NamedTuple):
    """One model's predictions at both places."""

    shifts: list[Shift]
    """The most likely tokens at the first place (`before`), and then those at the second
    (`after`)."""
    kl: float
    """KL(first || second), nats."""


class Comparison(NamedTuple):
    """What differs between two prompts, each at one place."""

    at: tuple[int, int]
    features: list[FeatureDifference]
    """All active ones, the largest difference first."""
    frozen: Predictions
    decoder: Predictions


@torch.no_grad()
def compare(first: Reading, second: Reading, at: int, other_at: int) -> Comparison:
    """Compare two readings by the same reader; positions count from the beginning."""
    frozen, decoder = (
        torch.stack(both)
        for both in zip(_logprobs(first, at), _logprobs(second, other_at), strict=True)
    )
    scales = first.reader.explainer.scales
    features = _differences(first.ranked(at), second.ranked(other_at), scales)
    return Comparison((at, other_at), features, _both(first, frozen), _both(first, decoder))


def _logprobs(reading: Reading, at: int) -> tuple[Tensor, Tensor]:
    """[V] each: the frozen model's and the decoder's."""
    text = reading.states.until(at + 1)
    mine = reading.reader.decoder.logits(text.latents.of(None))[0, -1]
    return reading.reader.lm.unembed(text.final[-1]).log_softmax(-1), mine.log_softmax(-1)


def _differences(
    first: Sequence[RankedFeature], second: Sequence[RankedFeature], scales: Tensor
) -> list[FeatureDifference]:
    here, there = ({one.latent: one for one in side} for side in (first, second))
    found = []
    for latent in here.keys() | there.keys():
        one, other = here.get(latent), there.get(latent)
        known = one or other
        assert known is not None
        acts = [0.0 if side is None else side.act for side in (one, other)]
        usual = float(scales[latent]) or max(acts)
        found.append(
            FeatureDifference(
                latent, known.label, acts[0], acts[1], (acts[1] - acts[0]) / usual,
                known.confidence, known.unsure_label, known.description,
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (-abs(one.difference), one.latent))


def _both(reading: Reading, logprobs: Tensor) -> Predictions:
    """From log probabilities [2, V]."""
    before, after = logprobs
    kl = float((before.exp() * (before - after)).sum().clamp_min(0))
    return Predictions(shifts(reading.reader.lm, before, after), kl)


def shifts(
    lm: FrozenLM,
    before: Float[Tensor, " vocab"],
    after: Float[Tensor, " vocab"],
    more: Sequence[int] = (),
) -> list[Shift]:
    """The most likely tokens before, those that came to be among them after, and some more.

    Args:
        before, after: [V] log probabilities.
    """
    best = [row.topk(TOP_TOKENS).indices.tolist() for row in (before, after)]
    return [
        Shift(token_text(lm, token), token, float(before[token].exp()), float(after[token].exp()))
        for token in dict.fromkeys([*best[0], *best[1], *more])
    ]

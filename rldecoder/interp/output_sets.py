"""Which tokens a latent raises: fitted on some places of the frozen model, tried on others.

Fit: at a place, taking the latent out lowers some tokens. `gain(v) = p(v) (log p(v) - log p'(v))`,
with p before and p' after, is how much of the change token v carries (the gains add up to
KL(p || p')). The mean gain over places leaves out the document in which the token gains most: a
token that only one document raises is that document's topic, not the latent's meaning. The *output
set* of a latent is the tokens with the largest `mean gain * (mean gain / mean gain under the other
latents)`, as words of a text are weighed by how few other texts have them: what every latent
raises, such as " the", says nothing about one (docs/experiments/labels_atoms.md).

Try: on places of other documents, the *drop* of log P(set) when the latent is taken out, beside
the drops of other latents' sets there, and beside the drop when another active latent is taken
out at the same length.

Axes: P place, K latent, V vocabulary, D model width, M set, G group of sets, T tokens of any set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.interp.ablation_pass import ROWS_PER_STEP, Ablated, Places
from rldecoder.lm.frozen import FrozenLM

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
KEPT = 64
"""Tokens of a place whose gains are kept: the others' are tiny."""
SET_TOKENS = 8
"""Largest output set."""
LEAST_GAIN = 0.1
"""A token's gain as a share of the largest, at least: rare tokens that gain next to nothing would
otherwise take up the set."""
USUAL_GAIN = 1e-5
"""Nats added to the mean gain of a token under the other latents."""
MIN_PLACES = 6
MIN_DOCUMENTS = 3
"""With fewer there is no output set."""
TINY = 1e-30


class Gains(NamedTuple):
    """The tokens that single places raise and lower most."""

    raised: NDArray[np.int32]
    """[P, KEPT] ids, the largest gain first."""
    raised_by: NDArray[np.float32]
    """[P, KEPT] nats."""
    lowered: NDArray[np.int32]
    """[P, KEPT] ids of what is likelier without the latent."""
    lowered_by: NDArray[np.float32]
    """[P, KEPT] `p'(v) (log p'(v) - log p(v))`, nats."""
    hidden: NDArray[np.float32]
    """[P, 3, D] final hidden states before, without the latent, without the other one; for sets
    that are not known yet. D is 0 where none will be tried at these places."""
    total: NDArray[np.float32]
    """[P, 3] what their log-probabilities are less than their logits."""
    lost: NDArray[np.float32]
    """[P] the probability that moves to other tokens without the latent."""

    @classmethod
    def empty(cls, number: int, vocabulary: int, width: int = 0) -> Gains:
        """Of places not run yet; `width` is D."""
        shape = (number, min(KEPT, vocabulary))
        ids, values = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        hidden, total = np.zeros((number, 3, width), np.float32), np.zeros((number, 3), np.float32)
        lost = np.zeros(number, np.float32)
        return cls(ids, values, ids.copy(), values.copy(), hidden, total, lost)

    @classmethod
    def of(cls, found: Ablated) -> Gains:
        """Of the places that were just run; with others, what it takes to try sets there later."""
        raised: list[Tensor] = []
        lowered: list[Tensor] = []
        lost: list[Tensor] = []
        for part in torch.arange(len(found.places)).split(ROWS_PER_STEP):
            before, without = found.before[found.spot[part]], found.without[part]
            change = before - without
            before, without = before.exp(), without.exp()
            lost.append(_lost(before, without))
            for kept, gain in ((raised, before.mul_(change)), (lowered, without.mul_(-change))):
                kept += gain.topk(min(KEPT, gain.shape[1]))

        columns = []
        for kept in (raised, lowered):
            values, ids = torch.cat(kept[::2]), torch.cat(kept[1::2])
            columns += [ids.cpu().numpy().astype(np.int32), values.cpu().numpy()]
        hidden, total = found.hidden, found.total
        if found.other is None:
            hidden, total = hidden.new_zeros(len(hidden), 3, 0), total.new_zeros(len(total), 3)
        rest = (hidden.float(), total, torch.cat(lost))
        return cls(*columns, *(column.cpu().numpy() for column in rest))

    def put(self, places: IntArray, found: Gains) -> None:
        """Take in the places of these numbers."""
        for column, values in zip(self, found, strict=True):
            column[places] = values


class OutputSet(NamedTuple):
    """What one latent raises, and what it lowers."""

    tokens: tuple[int, ...]
    """Ids, the largest weight first; empty where nothing recurs."""
    gains: tuple[float, ...]
    """Mean gain of each, nats, without its best document."""
    lowered: tuple[int, ...]
    lowered_by: tuple[float, ...]
    places: int
    """Places that it was fitted on."""
    documents: int
    failure: str | None
    """Why there is no set; None if there is one."""


def fit_sets(places: Places, gains: Gains, num_latents: int) -> list[OutputSet]:
    """The output set of each latent.

    Args:
        num_latents: K.
    """
    raised = _recurring(places, gains.raised, gains.raised_by, num_latents)
    lowered = _recurring(places, gains.lowered, gains.lowered_by, num_latents)
    out = []
    for row in range(num_latents):
        mine = places.row == row
        number, documents = int(mine.sum()), int(np.unique(places.document[mine]).size)
        failure = None
        if number < MIN_PLACES or documents < MIN_DOCUMENTS:
            failure = (
                f"fires strongly at {number} places of {documents} documents: fewer than "
                f"{MIN_PLACES} of {MIN_DOCUMENTS}"
            )
        elif not raised[row][0]:
            failure = "no token that it raises recurs in several documents"
        kept, dropped = (((), ()), ((), ())) if failure else (raised[row], lowered[row])
        out.append(OutputSet(*kept, *dropped, number, documents, failure))
    return out


def _recurring(
    places: Places, ids: NDArray[np.int32], gains: NDArray[np.float32], num_latents: int
) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Tokens of each latent by weight, with their mean gains without their best document."""
    place, slot = np.nonzero(gains > 0)
    token, gain = ids[place, slot].astype(np.int64), gains[place, slot].astype(np.float64)
    # Sums by (latent, token, document), then the largest of each (latent, token) is left out. One
    # number a triple: sorting those is ten times faster than sorting columns.
    known, document = np.unique(places.document, return_inverse=True)
    width, depth = int(token.max(initial=0)) + 1, max(known.size, 1)
    triple = (places.row[place] * width + token) * depth + document[place]
    kinds, at = np.unique(triple, return_inverse=True)
    by_document = np.bincount(at, gain, minlength=kinds.size)
    pair, first = np.unique(kinds // depth, return_index=True)
    pairs = np.stack(np.divmod(pair, width))
    total = np.add.reduceat(by_document, first) if first.size else by_document
    best = np.maximum.reduceat(by_document, first) if first.size else by_document
    number = np.maximum(np.bincount(places.row, minlength=num_latents), 1)
    mean = (total - best) / number[pairs[0]]

    # What other latents raise as well counts for less.
    everywhere = np.bincount(pairs[1], mean)[pairs[1]]
    others = np.maximum(everywhere - mean, 0) / max(num_latents - 1, 1)
    weight = mean * mean / (others + USUAL_GAIN)

    out = []
    for row in range(num_latents):
        mine = np.flatnonzero(pairs[0] == row)
        mine = mine[mean[mine] > LEAST_GAIN * mean[mine].max(initial=0)]
        order = mine[np.argsort(-weight[mine], kind="stable")][:SET_TOKENS]
        out.append((tuple(pairs[1][order].tolist()), tuple(mean[order].tolist())))
    return out


class Tried(NamedTuple):
    """What `Trier` says of n places; the first four become the rows of a `Trial`."""

    drop: NDArray[np.float32]
    """[n, G]"""
    other_drop: NDArray[np.float32]
    """[n, G]"""
    above: NDArray[np.float32]
    """[n, G]"""
    share: NDArray[np.float32]
    """[n, G]"""
    drops: NDArray[np.float32]
    """[n, G, M] of every set."""


class Trial(NamedTuple):
    """What taking latents out did to sets at P places; G groups of sets."""

    drop: NDArray[np.float32]
    """[P, G] log P(set) - log P(set without the latent), nats; NaN without a set."""
    other_drop: NDArray[np.float32]
    """[P, G] the same without another active latent, at the same length."""
    above: NDArray[np.float32]
    """[P, G] share of the group's other sets that fall by less at this place."""
    share: NDArray[np.float32]
    """[P, G] of all probability that moves to other tokens, what the set loses."""
    sums: NDArray[np.float32]
    """[G, F, K, M] drops of every set, added up over a latent's places in each part of the text."""

    @classmethod
    def empty(cls, number: int, groups: int, parts: int, num_latents: int, num_sets: int) -> Trial:
        """Of places not run yet."""
        unknown = np.full((number, groups), np.nan, np.float32)
        sums = np.zeros((groups, parts, num_latents, num_sets), np.float32)
        return cls(unknown, unknown.copy(), unknown.copy(), unknown.copy(), sums)

    def put(self, places: IntArray, found: Tried, part: IntArray, rows: IntArray) -> None:
        """Take in the places of these numbers, each number once and in order: sums round.

        Args:
            part: [n] which part of the text each is in.
            rows: [n] its latent.
        """
        for column, values in zip(self[:4], found[:4], strict=True):
            column[places] = values
        for sums, drops in zip(self.sums, found.drops.swapaxes(0, 1), strict=True):
            np.add.at(sums, (part, rows), drops)


class SetGroup(NamedTuple):
    """Sets that are compared with each other."""

    tokens: Sequence[tuple[int, ...]]
    """Token ids of each; empty ones take no part."""
    own: IntArray
    """[K] which of them is tried at the places of each latent."""
    rivals: BoolArray | None = None
    """[K, M] which of them it is compared with; None: with all others."""

    def against(self, rows: IntArray) -> BoolArray:
        """[n, M] what the sets of n latents are compared with: never with empty ones."""
        filled = np.array([len(tokens) > 0 for tokens in self.tokens], bool)
        if self.rivals is not None:
            return filled & self.rivals[rows]
        return filled & (np.arange(filled.size) != self.own[rows][:, None])


class Trier:
    """Tries groups of sets at places.

    Args:
        groups: of equal size.
        rows: [P] the latent of each place.
    """

    def __init__(self, groups: Sequence[SetGroup], rows: IntArray, device: torch.device) -> None:
        self.groups, self._rows = groups, rows
        flat = sorted({token for group in groups for held in group.tokens for token in held})
        self._tokens = torch.tensor(flat, dtype=torch.long, device=device)
        column = {token: number for number, token in enumerate(flat)}
        self._members = []
        for group in groups:
            member = torch.zeros(len(flat), len(group.tokens))
            for number, held in enumerate(group.tokens):
                member[[column[token] for token in held], number] = 1
            self._members.append(member.to(device))

    def of(self, found: Ablated) -> Tried:
        """What the places say that were just run, with others."""
        assert found.other is not None
        before, without, other = (
            part[:, self._tokens].exp() for part in (found.before, found.without, found.other)
        )
        steps = torch.arange(len(found.places)).split(ROWS_PER_STEP)
        lost = torch.cat(
            [_lost(found.before[found.spot[i]].exp(), found.without[i].exp()) for i in steps]
        )
        return self._try(found.places, before[found.spot], without, other, lost)

    def again(self, places: IntArray, gains: Gains, lm: FrozenLM) -> Tried:
        """What places say that were run before, with others, when these sets were not known.

        Args:
            places: [n] their numbers.
            lm: makes logits of the hidden states that were kept.
        """
        device = self._tokens.device
        kept = (gains.hidden[places], gains.total[places], gains.lost[places])
        hidden, total, lost = (torch.from_numpy(column).to(device) for column in kept)
        logits = lm.unembed(hidden.to(lm.dtype), tokens=self._tokens)
        before, without, other = (logits - total[..., None]).exp().unbind(1)
        return self._try(places, before, without, other, lost)

    def _try(
        self, places: IntArray, before: Tensor, without: Tensor, other: Tensor, lost: Tensor
    ) -> Tried:
        """From probabilities [n, T] of all tokens of any set."""
        rows = self._rows[places]
        by_group = []
        for group, member in zip(self.groups, self._members, strict=True):
            # Every set's drop at every place; the sums give each latent's mean over its places.
            own = torch.from_numpy(group.own[rows]).to(member.device)
            filled = member.sum(0) > 0
            start = _log(before @ member)
            drops = start - _log(without @ member)

            # The own set against its rivals, place by place; a tie counts half.
            mine = drops.gather(1, own[:, None])
            rivals = torch.from_numpy(group.against(rows)).to(member.device)
            under = ((mine > drops).float() + 0.5 * (mine == drops).float()) * rivals
            above = under.sum(1) / rivals.sum(1).clamp_min(1)

            # The other latent's effect on the own set, and how much of all that falls is in it.
            after_other = _log(other @ member).gather(1, own[:, None])
            fallen = (before - without).clamp_min(0) @ member
            share = fallen.gather(1, own[:, None])[:, 0] / lost.clamp_min(TINY)
            values = (mine[:, 0], (start.gather(1, own[:, None]) - after_other)[:, 0], above, share)
            has = filled[own]
            own_values = [torch.where(has, value, torch.nan).cpu().numpy() for value in values]
            by_group.append((*own_values, drops.cpu().numpy()))
        return Tried(*(np.stack(column, axis=1) for column in zip(*by_group, strict=True)))


def _lost(before: Tensor, without: Tensor) -> Tensor:
    """[n] what tokens lose of their probabilities [n, V]."""
    return (before - without).clamp_min_(0).sum(-1)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp_min(TINY).log()

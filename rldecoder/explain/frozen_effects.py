"""Exact effects of features on the frozen model's predictions: what claims are about.

The effect of a feature on a prediction is log p(token) - log p(token without the feature), in
nats; positive supports the token, which is the frozen model's most likely one. `act *
W_dec[feature]` is taken out of the residual stream at the place of the prediction, at the hook
layer, and nothing else: the SAE's error stays, and so does everything before. The blocks above are
run again for every intervention (`rldecoder.lm.ablation`).

Axes: N place, K active latents, C candidates (at most K), M interventions, D model width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import FrozenParts, SaeDecoderForCausalLM
from rldecoder.explain.patching import PROBE_SEED, TINY, Candidates, Measured, Outcomes
from rldecoder.explain.texts import Texts
from rldecoder.lm.ablation import PlaceReader, ReadSequence
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import torch_generator

ROWS_AT_ONCE = 256
"""Variants that are run together."""
PROBES = 8
"""Random directions, each with its opposite, that show how a prediction bends."""


class FrozenPlaces(NamedTuple):
    """N positions of texts whose predictions by the frozen model are looked at."""

    latents: SparseLatents
    """[N, K] active there."""
    texts: Texts
    """What they lie in."""

    def of(self, chosen: Tensor | slice) -> FrozenPlaces:
        """Only some places: an index or a mask over N."""
        return FrozenPlaces(self.latents.of(chosen), self.texts.of(chosen))


class TextReader:
    """Reads texts in the frozen model; the last one is kept, since it is often asked for again."""

    def __init__(self, frozen: FrozenParts) -> None:
        self._reader = PlaceReader(frozen.lm, frozen.sae.spec.hook_layer)
        self._resid: Tensor | None = None
        self._read: ReadSequence | None = None

    def read(self, resid: Tensor) -> ReadSequence:
        """A text [T, D] with its key-value cache."""
        if self._read is None or self._resid is not resid:
            self._resid, self._read = resid, self._reader.sequence(resid)
        return self._read


def text_by_text(
    frozen: FrozenParts, places: FrozenPlaces, size: int, reader: TextReader | None = None
) -> Iterator[tuple[Tensor, ReadSequence]]:
    """Groups of at most `size` places of one text, as an index [n], and the text read.

    Args:
        reader: one that may have read the text before.
    """
    reader = TextReader(frozen) if reader is None else reader
    text = places.texts.text
    everything = torch.arange(len(text), device=text.device)
    for number in text.unique().tolist():
        read = reader.read(places.texts.resid[number])
        for rows in everything[text == number].split(size):
            yield rows, read


def why_slow(frozen: FrozenParts, places: FrozenPlaces) -> str | None:
    """Why every intervention takes a run over its whole text; None where it is one token."""
    reader = PlaceReader(frozen.lm, frozen.sae.spec.hook_layer)
    text = reader.sequence(places.texts.resid[0])
    with torch.no_grad():
        text.hidden(text.resid[-1:], torch.tensor([len(text.resid) - 1]))
    return reader.slow_because


def find_candidates(
    decoder: SaeDecoderForCausalLM,
    places: FrozenPlaces,
    count: int,
    excluded: Tensor | None = None,
    probes: int = PROBES,
    reader: TextReader | None = None,
) -> Candidates:
    """The `count` active latents of each place with the largest |attribution|, in that order.

    Args:
        decoder: whose rows give the contributions; everything else is the frozen model's.
        places: N of them.
        count: C is the smaller of `count` and K.
        excluded: [L] bool, latents that are no candidates. They stay active in the prediction;
            a place with too few others is padded.
        probes: random directions for the curvature in `Candidates.sensitivity`; with 0 it is 0,
            and the noise floor is that of the first order.
        reader: as in `text_by_text`.
    """
    count = min(count, places.latents.acts.shape[-1])
    found = [
        (rows, _candidates(decoder, places.of(rows), read, count, excluded, probes))
        for rows, read in text_by_text(decoder.frozen, places, ROWS_AT_ONCE, reader)
    ]
    order = torch.cat([rows for rows, _ in found]).argsort()
    columns = zip(*(part for _, part in found), strict=True)
    return Candidates(*(torch.cat(column)[order] for column in columns))


def _candidates(
    decoder: SaeDecoderForCausalLM,
    places: FrozenPlaces,
    read: ReadSequence,
    count: int,
    excluded: Tensor | None,
    probes: int,
) -> Candidates:
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    position = places.texts.position
    with torch.enable_grad():
        resid = read.resid[position].float().detach().requires_grad_()
        logprobs = lm.unembed(read.hidden(resid, position)).log_softmax(-1)
        best = logprobs.max(-1)
        (gradient,) = torch.autograd.grad(best.values.sum(), resid)

    with torch.no_grad():
        acts, indices = places.latents
        if excluded is not None:
            acts = acts * ~excluded[indices]
        rows = F.embedding(indices, sae.W_dec)
        attributions = acts * torch.einsum("nkd,nd->nk", rows, gradient)
        # Real candidates first, whatever their attribution: the rest is padding.
        key = attributions.abs().masked_fill(acts <= 0, -1.0)
        chosen = key.topk(count, dim=-1).indices
        acts = acts.gather(-1, chosen)
        indices = indices.gather(-1, chosen) * (acts > 0)

        # The decoder's own view of the same features: what each adds to the token's logit there.
        direct = decoder.direct(indices.flatten()).view(*indices.shape, -1)
        toward = lm.choice_directions(best.indices)
        contributions = acts * torch.einsum("ncd,nd->nc", direct.float(), toward)

        curvature = torch.zeros_like(best.values)
        if probes:
            lengths = acts * F.embedding(indices, sae.W_dec).norm(dim=-1)
            active = (acts > 0).sum(-1).clamp_min(1)
            usual = (lengths.square().sum(-1) / active).sqrt().clamp_min(TINY)
            curvature = _curvature(read, position, best, usual, probes)
        deviation = gradient.norm(dim=-1) / gradient.shape[-1] ** 0.5
    return Candidates(
        best.indices, best.values.detach(), acts, indices, contributions,
        attributions.gather(-1, chosen), torch.stack([deviation, curvature], dim=-1),
    )  # fmt: skip


def _curvature(
    read: ReadSequence, position: Tensor, best: torch.return_types.max, usual: Tensor, probes: int
) -> Tensor:
    """[n]: mean effect per squared length of random directions and their opposites, which no
    formula gives for blocks; of length `usual` [n]."""
    width = read.resid.shape[1]
    generator = torch_generator(PROBE_SEED, "probes")
    drawn = torch.randn(probes, width, generator=generator).to(usual.device)
    drawn = F.normalize(torch.cat([drawn, -drawn]), dim=-1)
    total = torch.zeros_like(usual)
    for part in torch.arange(len(usual), device=usual.device).split(
        max(1, ROWS_AT_ONCE // len(drawn))
    ):
        moved = (usual[part, None, None] * drawn).flatten(0, 1)
        where = position[part].repeat_interleave(len(drawn))
        after = _log_of(read, moved, where, best.indices[part].repeat_interleave(len(drawn)))
        total[part] = (best.values[part, None] - after.view(len(part), -1)).mean(-1)
    return (total / usual.square()).clamp_min(0)


def _log_of(read: ReadSequence, removed: Tensor, position: Tensor, token: Tensor) -> Tensor:
    """[n]: log p(token) with `removed` [n, D] taken out at `position` [n]."""
    logprobs = read.logprobs(read.without(removed, position), position)
    return logprobs.gather(-1, token[:, None])[:, 0]


@torch.no_grad()
def measure(
    frozen: FrozenParts,
    places: FrozenPlaces,
    candidates: Candidates,
    removals: Tensor | None = None,
    reader: TextReader | None = None,
) -> Measured:
    """Exact effects of removing each candidate alone, and of joint interventions.

    Args:
        places: N of them, unpatched.
        candidates: of the same places.
        removals: [N, M, C], the removed share of each candidate, 0 to 1.
        reader: as in `text_by_text`.
    """
    num_places, num_candidates = candidates.acts.shape
    if removals is None:
        removals = candidates.acts.new_zeros(num_places, 0, num_candidates)
    single = torch.eye(num_candidates, device=removals.device).expand(num_places, -1, -1)
    latents = SparseLatents(candidates.acts, candidates.indices)
    shares = torch.cat([single, removals], dim=1)
    effects, margins = _run(frozen, places, latents, shares, candidates, reader)
    return Measured(
        effects[:, :num_candidates], effects[:, num_candidates:], margins[:, num_candidates:]
    )


@torch.no_grad()
def run_patched(
    frozen: FrozenParts, places: FrozenPlaces, shares: Tensor, candidates: Candidates
) -> Outcomes:
    """What any change of the active features does.

    Args:
        places: N of them, unpatched.
        shares: [N, M, K], what is taken from each activation: 1 removes, 0.5 halves, -1 doubles.
        candidates: of the same places; their token and its log p are used.
    """
    effects, margins = _run(frozen, places, places.latents, shares, candidates)
    return Outcomes(effects, margins < 0)


def _run(
    frozen: FrozenParts,
    places: FrozenPlaces,
    latents: SparseLatents,
    shares: Tensor,
    candidates: Candidates,
    reader: TextReader | None = None,
) -> tuple[Tensor, Tensor]:
    """Effects and margins [N, M] of interventions that take shares [N, M, K] of latents [N, K]."""
    effects, margins = shares.new_zeros(2, *shares.shape[:2])
    few = max(1, ROWS_AT_ONCE // max(shares.shape[1], 1))
    for rows, read in text_by_text(frozen, places, few, reader):
        directions = F.embedding(latents.indices[rows], frozen.sae.W_dec)
        taken = shares[rows] * latents.acts[rows, None]
        removed = torch.einsum("nmk,nkd->nmd", taken, directions).flatten(0, 1)
        position = places.texts.position[rows].repeat_interleave(shares.shape[1])
        after = read.logprobs(read.without(removed, position), position)
        token = candidates.tokens[rows].repeat_interleave(shares.shape[1])[:, None]
        mine = after.gather(-1, token)[:, 0]
        others = after.scatter_(-1, token, float("-inf")).amax(-1)
        shape = (len(rows), -1)
        effects[rows] = candidates.logprobs[rows, None] - mine.view(shape)
        margins[rows] = (mine - others).view(shape)
    return effects, margins

"""Near-duplicate latents: found by three kinds of likeness, merged only if ablation agrees.

Likeness of two latents, each on the `test` split:
    decoder: cosine of their SAE decoder rows.
    co-activation: Jaccard index of the tokens where they fire, and Pearson correlation of their
        activations.
    label: Jaccard index of the tokens where their predicates hold, or of their output sets by
        gain; and, if asked for, the cosine of the labels' embeddings (`label_embedding`), which
        labels in words have too.
A pair that is alike in at least `min_votes` of the three is tested by ablation: the *fingerprint*
of a latent is the mean change of the decoder's logits of a set of probe tokens when the latent is
set to zero where it fires. Fingerprints agree if their cosine is high enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from rldecoder.config.interp import ClusterFeaturesConfig
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.sequences import hidden_of_rows
from rldecoder.sae.model import SparseLatents

SEQUENCES_AT_ONCE = 16
"""That a decoder with blocks reads together."""

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

PAIRS = pa.schema(
    [
        ("latent_a", pa.int32()),
        ("latent_b", pa.int32()),
        ("decoder_cosine", pa.float64()),
        ("jaccard", pa.float64()),
        ("pearson", pa.float64()),
        ("label_jaccard", pa.float64()),
        ("label_cosine", pa.float64()),
        ("output_jaccard", pa.float64()),
        ("votes", pa.int32()),
        ("fingerprint_cosine", pa.float64()),
        ("agree", pa.bool_()),
        ("merged", pa.bool_()),
    ]
)
"""One row a pair with at least one vote. `label_jaccard` is null if one of the two has no
predicate, `label_cosine` if one has no label or embeddings were not asked for;
`output_jaccard` if one has no output set;
`fingerprint_cosine` is null if the pair had too few votes to be tested, or one of the two has no
effect on the probe tokens. `merged`: b became an alias of a or both of a third."""


class Likeness(NamedTuple):
    """Symmetric matrices [K, K]; the diagonal is not used."""

    decoder_cosine: FloatArray
    jaccard: FloatArray
    pearson: FloatArray
    label_jaccard: FloatArray
    """NaN where one of the two latents has no predicate."""
    label_cosine: FloatArray
    """Of label embeddings; NaN where there is none."""
    output_jaccard: FloatArray
    """Of output sets, tokens weighted by gain; NaN where one has none."""

    def of(self, first: int, second: int) -> dict[str, float | None]:
        """Two latents' columns of PAIRS; None for NaN."""
        found = {name: float(values[first, second]) for name, values in self._asdict().items()}
        return {name: None if np.isnan(value) else value for name, value in found.items()}

    def votes(self, limits: ClusterFeaturesConfig) -> NDArray[np.int64]:
        """[K, K] in how many of the three kinds two latents are alike."""
        together = (self.jaccard >= limits.jaccard) | (self.pearson >= limits.pearson)
        # Three ways to see that labels say the same, and still one vote.
        label = np.nan_to_num(self.label_jaccard, nan=-1.0) >= limits.label_jaccard
        label |= np.nan_to_num(self.label_cosine, nan=-1.0) >= limits.label_cosine
        label |= np.nan_to_num(self.output_jaccard, nan=-1.0) >= limits.output_jaccard
        near = self.decoder_cosine >= limits.decoder_cosine
        votes = near.astype(np.int64) + together.astype(np.int64) + label.astype(np.int64)
        return votes


def likeness(
    directions: FloatArray,
    acts: sparse.csr_array,
    num_cells: int,
    labels: list[BoolArray | None],
    embedded: FloatArray | None = None,
    outputs: Sequence[Mapping[int, float]] | None = None,
) -> Likeness:
    """Compare K latents with each other.

    Args:
        directions: [K, D] SAE decoder rows.
        acts: [K, cells] activations.
        num_cells: how many of the cells were read; the others are no data, not zeros.
        labels: for each latent where its predicate holds among the cells read [cells], or None.
        embedded: [K, E] label embeddings of length 1, rows of NaN without a label; None: no such.
        outputs: gains of the tokens that each latent raises, empty without an output set; None:
            no latent has one.
    """
    unit = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    fires = sparse.csr_array(acts, dtype=np.float64)
    values = fires.copy()
    fires.data = np.ones_like(fires.data)
    empty = np.zeros(acts.shape[1], bool)
    held = sparse.csr_array(
        np.stack([empty if label is None else label for label in labels]), dtype=np.float64
    )
    label = _jaccard(held)
    missing = np.array([label_mask is None for label_mask in labels])
    label[missing, :] = np.nan
    label[:, missing] = np.nan
    cosine = np.full(label.shape, np.nan) if embedded is None else embedded @ embedded.T
    raised = np.full(label.shape, np.nan) if outputs is None else output_jaccard(outputs)
    together, joint = _jaccard(fires), _pearson(values, num_cells)
    return Likeness(unit @ unit.T, together, joint, label, cosine, raised)


def output_jaccard(sets: Sequence[Mapping[int, float]]) -> FloatArray:
    """[K, K] weighted Jaccard index, sum of minima over sum of maxima, of gains scaled to 1."""
    out = np.full((len(sets), len(sets)), np.nan)
    scaled = [{token: gain / sum(held.values()) for token, gain in held.items()} for held in sets]
    for i, first in enumerate(scaled):
        for j, second in enumerate(scaled):
            if first and second:
                common = sum(min(gain, second.get(token, 0.0)) for token, gain in first.items())
                out[i, j] = common / (2 - common)
    return out


def _jaccard(rows: sparse.csr_array) -> FloatArray:
    """Jaccard index of 0/1 rows; 0 for two empty ones."""
    both = np.asarray((rows @ rows.T).todense())
    size = both.diagonal()
    either = size[:, None] + size[None, :] - both
    return both / np.maximum(either, 1)


def _pearson(rows: sparse.csr_array, num_cells: int) -> FloatArray:
    """Correlation of sparse rows over `num_cells` cells; 0 for a constant row."""
    mean = np.asarray(rows.sum(1)).reshape(-1) / num_cells
    covariance = np.asarray((rows @ rows.T).todense()) / num_cells - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(covariance.diagonal(), 0))
    scale = np.outer(spread, spread)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-20)


class HeldOutRows(NamedTuple):
    """Held-out tokens in order, whole sequences (the last may be cut short). N tokens."""

    latents: SparseLatents
    """[N, K]"""
    seq_id: Tensor
    """[N]"""
    pos: Tensor
    """[N] in its sequence."""

    def some(self, chosen: Tensor) -> HeldOutRows:
        """Only the tokens that the ascending index `chosen` names."""
        return HeldOutRows(self.latents.of(chosen), self.seq_id[chosen], self.pos[chosen])


@torch.no_grad()
def fingerprints(
    decoder: SaeDecoderForCausalLM,
    rows: HeldOutRows,
    wanted: list[int],
    probes: Tensor,
    max_tokens: int,
) -> dict[int, FloatArray]:
    """Mean effect [P] on the decoder's probe logits of setting a latent to zero where it fires.

    The effect is that on the prediction at the same token; with blocks, ablations earlier in the
    sequence have a part in it. The mean over probes is taken off, since a shift of all logits
    changes no probability.

    Args:
        rows: held-out tokens.
        wanted: ids of the latents to ablate; one that never fires in `rows` is left out.
        probes: [P] token ids.
        max_tokens: at most so many tokens a latent.
    """
    unembedding = decoder.frozen.lm.unembedding[probes].float()
    out = {}
    for latent in wanted:
        hit = (rows.latents.indices == latent) & (rows.latents.acts > 0)
        where = torch.nonzero(hit.any(-1)).reshape(-1)[:max_tokens]
        if where.numel() == 0:
            continue
        effect = _mean_change(decoder, rows, hit, where) @ unembedding.T
        out[latent] = (effect - effect.mean()).double().cpu().numpy()
    return out


def _mean_change(
    decoder: SaeDecoderForCausalLM, rows: HeldOutRows, hit: Tensor, where: Tensor
) -> Tensor:
    """[D] mean change of the predicted hidden state of the tokens `where`, at which what `hit`
    [N, K] names is set to zero."""
    if not decoder.looks_back:
        parts = [where]  # the other tokens have no part in it
    else:
        sequences = rows.seq_id[where].unique().split(SEQUENCES_AT_ONCE)
        parts = [torch.isin(rows.seq_id, some).nonzero()[:, 0] for some in sequences]
    total = torch.zeros(decoder.config.d_model, device=decoder.W.device)
    for inside in parts:
        part, mine = rows.some(inside), torch.isin(inside, where)
        acts = part.latents.acts.masked_fill(hit[inside] & mine[:, None], 0.0)
        ablated = SparseLatents(acts, part.latents.indices)
        before = hidden_of_rows(decoder, part.latents, part.seq_id, part.pos)
        after = hidden_of_rows(decoder, ablated, part.seq_id, part.pos)
        total += (after - before)[mine].float().sum(0)
    return total / len(where)


def fingerprint_cosine(a: FloatArray | None, b: FloatArray | None) -> float | None:
    """Cosine of two fingerprints; None if one is missing or zero."""
    if a is None or b is None:
        return None
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 else None


def merge(order: list[int], agreeing: set[frozenset[int]]) -> dict[int, list[int]]:
    """Clusters as representative -> members (itself first), from pairs that agree.

    Latents are taken in `order` (most important first); each joins the first representative it
    agrees with itself, or starts a cluster. So no two latents are merged through a third.
    """
    clusters: dict[int, list[int]] = {}
    for latent in order:
        for representative, members in clusters.items():
            if frozenset((representative, latent)) in agreeing:
                members.append(latent)
                break
        else:
            clusters[latent] = [latent]
    return clusters

"""Sums of importance over a domain: the table per latent, and how much of it the top k hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import RootModel
from torch import Tensor

from rldecoder.evals.statistics import Measured, with_interval
from rldecoder.interp.importance import Attribution, PatchBatch
from rldecoder.schemas import JsonFile, JsonRecord, Scalar

FloatArray = NDArray[np.float64]

IMPORTANCE = pa.schema(
    [
        ("latent", pa.int32()),
        ("domain", pa.string()),
        ("target", pa.string()),
        ("importance", pa.float64()),
        ("signed", pa.float64()),
        ("count", pa.int64()),
    ]
)
"""One row a latent that fired, a domain and a target. `importance` is the mean of |I| and `signed`
the mean of I over all positions considered (nats a position; a latent that does not fire there
counts 0), `count` the positions where it fired. A latent without a row has importance 0."""

MASS_KS = (1, 5, 10, 20, 50)
HEADLINE_K = 10
NUM_BLOCKS = 20


class TopShare(JsonRecord):
    """Share of importance held by the k latents that hold most, 0 to 1."""

    per_position: Measured
    """Mean over positions of (sum of the k largest |I| there) / (sum of all |I| there + |I of the
    error term|)."""
    overall: Measured
    """The same with sums over the whole domain first, for the k latents that hold most there."""


class TargetMass(JsonRecord):
    """How concentrated importance is, in one domain and for one target."""

    num_positions: int
    """Positions that were added up."""
    top_k: dict[int, TopShare] | None
    """By k, one of MASS_KS; None without positions."""
    error_share: Measured | None
    """The error term's part of the overall denominator; None without positions."""


class ImportanceMass(JsonFile, RootModel[dict[str, dict[str, TargetMass]]]):
    """By domain and target."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """The mass of the top 10."""
        return {
            f"{target}_top10_mass_{domain}": (
                None if mass.top_k is None else mass.top_k[HEADLINE_K].per_position.value
            )
            for domain, targets in self.root.items()
            for target, mass in targets.items()
        }


class SequenceImportance(NamedTuple):
    """Importance at the considered positions of one sequence, on the CPU; n of them."""

    latents: Tensor
    """[n, K] float32, of each active latent."""
    indices: Tensor
    """[n, K] int64, their ids."""
    active: Tensor
    """[n, K] bool, whether it fires there."""
    error: Tensor
    """[n] float32, of the SAE's error term."""


def sequences_of(
    batch: PatchBatch, found: Attribution, considered: Tensor
) -> list[SequenceImportance]:
    """The positions `considered` [B, T] of each sequence of a batch."""
    return [
        SequenceImportance(
            found.latents[row][keep].cpu(),
            batch.latents.indices[row][keep].cpu(),
            (batch.latents.acts[row][keep] > 0).cpu(),
            found.error[row][keep].cpu(),
        )
        for row, keep in enumerate(considered)
    ]


class Tally:
    """Adds up attributions of one domain and one target.

    Sums are also kept in NUM_BLOCKS blocks of sequences, so that confidence intervals come from
    a bootstrap over blocks in bounded memory (tokens of one sequence are not independent).
    """

    def __init__(self, num_latents: int) -> None:
        self.absolute = torch.zeros(NUM_BLOCKS, num_latents, dtype=torch.float64)
        self.signed = torch.zeros(num_latents, dtype=torch.float64)
        self.count = torch.zeros(num_latents, dtype=torch.int64)
        self.error = np.zeros(NUM_BLOCKS)
        self.share = np.zeros((NUM_BLOCKS, len(MASS_KS)))
        self.positions = np.zeros(NUM_BLOCKS)
        self.sequences = 0

    def add(self, found: SequenceImportance) -> None:
        """Add a sequence."""
        block = self.sequences % NUM_BLOCKS
        self.sequences += 1
        values, error = found.latents.double(), found.error.double().abs()
        flat = found.indices.reshape(-1)
        self.absolute[block].index_add_(0, flat, values.abs().reshape(-1))
        self.signed.index_add_(0, flat, values.reshape(-1))
        self.count.index_add_(0, flat, found.active.long().reshape(-1))
        self.error[block] += float(error.sum())
        self.share[block] += _top_shares(values.abs(), error)
        self.positions[block] += len(error)

    def state(self) -> dict[str, Tensor]:
        """All sums, for a checkpoint."""
        return {name: torch.as_tensor(value) for name, value in vars(self).items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over the sums of a checkpoint; the inverse of `state`."""
        for name, value in vars(self).items():
            new: Tensor | FloatArray | int = state[name]
            if not isinstance(value, Tensor):
                new = state[name].numpy() if isinstance(value, np.ndarray) else int(state[name])
            setattr(self, name, new)

    @property
    def num_positions(self) -> int:
        """Positions added so far."""
        return int(self.positions.sum())

    def columns(self) -> dict[str, list[Any]]:
        """Of IMPORTANCE: the latents that fired, with their means over all positions."""
        count = self.count.numpy()
        latent = np.flatnonzero(count)
        scale = max(self.num_positions, 1)
        sums = {"importance": self.absolute.sum(0).numpy(), "signed": self.signed.numpy()}
        means = {name: (total[latent] / scale).tolist() for name, total in sums.items()}
        return {"latent": latent.tolist(), **means, "count": count[latent].tolist()}

    def mass(self, *, resamples: int = 500, seed: int = 0) -> TargetMass:
        """Share of importance held by the top k latents, for k in MASS_KS, with intervals."""
        rng = np.random.default_rng(seed)
        used = np.flatnonzero(self.positions)
        if used.size == 0 or float(self.absolute.sum()) + self.error.sum() == 0:
            return TargetMass(num_positions=self.num_positions, top_k=None, error_share=None)

        # First the blocks as they are, then resamples: how often each block is drawn.
        weights = np.zeros((1 + resamples, NUM_BLOCKS))
        weights[0, used] = 1
        share = np.full(used.size, 1 / used.size)
        weights[1:, used] = rng.multinomial(used.size, share, size=resamples)

        absolute = self.absolute.numpy()
        totals = absolute.sum(1) + self.error
        denominator = np.maximum(weights @ totals, np.finfo(float).tiny)
        local = (weights @ self.share) / (weights @ self.positions)[:, None]

        # The top latents are chosen once: chosen anew in each resample, their share is biased up.
        top = np.argsort(-absolute.sum(0), kind="stable")[: max(MASS_KS)]
        held = (weights @ absolute[:, top]).cumsum(1)
        overall = np.stack([held[:, min(k, top.size) - 1] for k in MASS_KS], 1)
        overall /= denominator[:, None]
        error = (weights @ self.error) / denominator
        return TargetMass(
            num_positions=self.num_positions,
            top_k={
                k: TopShare(
                    per_position=with_interval(local[:, i]), overall=with_interval(overall[:, i])
                )
                for i, k in enumerate(MASS_KS)
            },
            error_share=with_interval(error),
        )


def _top_shares(absolute: Tensor, error: Tensor) -> FloatArray:
    """[len(MASS_KS)] sums over positions of the top-k shares; a position without any counts 0."""
    ordered = absolute.sort(-1, descending=True).values.cumsum(-1)
    total = (ordered[:, -1] + error).clamp_min(torch.finfo(torch.float64).tiny)
    width = ordered.shape[1]
    shares = [float((ordered[:, min(k, width) - 1] / total).sum()) for k in MASS_KS]
    return np.array(shares)

"""Which latents are largest, and which exceed a floor: the searches through all pre-activations.

Two ways give the same answer. On a CPU with AVX-512, numpy partitions 16-bit keys: the upper half
of a float, read as an integer, orders non-negative floats. Anywhere else torch's own `topk` and
`nonzero` do it. Negative values may come in any order, for their activations are 0.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_Part = TypeVar("_Part")
_Found = TypeVar("_Found")

_PIECE_ROWS = 256
"""Rows that one thread searches at a time: they stay in its cache."""


class SparseLatents(NamedTuple):
    """Active latents of each token. An activation of 0 is padding, whatever its index says."""

    acts: Tensor
    """[..., K] float32, >= 0."""
    indices: Tensor
    """[..., K] int64 in [0, num_latents)."""

    def of(self, chosen: Tensor | slice | int | None) -> SparseLatents:
        """Only some tokens: an index or a mask over the first axis; None puts an axis before it."""
        return SparseLatents(self.acts[chosen], self.indices[chosen])


def join_latents(parts: Sequence[SparseLatents]) -> SparseLatents:
    """Concatenate along N; a ReLU SAE's batches [N, K] differ in K and are padded with act 0."""
    widest = max(part.acts.shape[-1] for part in parts)
    return SparseLatents(
        *(
            torch.cat([F.pad(column, (0, widest - column.shape[-1])) for column in columns])
            for columns in zip(*parts, strict=True)
        )
    )


def top_k(pre_acts: Float[Tensor, "*places latents"], k: int) -> SparseLatents:
    """The k largest pre-activations [..., L] of each token, negative ones as zero activations."""
    num_latents = pre_acts.shape[-1]
    flat = pre_acts.reshape(-1, num_latents)
    if not flat.shape[0]:
        indices = flat.new_zeros((0, k), dtype=torch.int64)
    elif _by_short_keys(flat):
        indices = _top_k_by_short_keys(flat.detach(), k)
    else:
        indices = _top_k_by_groups(flat.detach(), k)
    acts = torch.relu(flat.gather(1, indices))
    shape = (*pre_acts.shape[:-1], k)
    return SparseLatents(acts.view(shape), indices.view(shape))


def cells_of(
    mask: Bool[Tensor, "tokens latents"],
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " tokens"]]:
    """Where [N, L] is true: the latents of all cells, row by row, and their number in each row."""
    if mask.device.type != "cpu":
        return mask.nonzero(as_tuple=True)[1], mask.sum(1)
    # numpy found the true cells of a mask seven times as fast as torch (measured on 2 cores).
    found = _in_threads(np.flatnonzero, [part.numpy() for part in mask.split(_PIECE_ROWS)])
    latents = np.concatenate([cells % mask.shape[1] for cells in found] or [np.empty(0, np.int64)])
    return torch.from_numpy(latents), mask.sum(1)


def _by_short_keys(values: Tensor) -> bool:
    """Whether numpy's vectorised partition of 16-bit keys can and should be used."""
    return (
        values.device.type == "cpu"
        and values.dtype in (torch.float32, torch.bfloat16)
        and sys.byteorder == "little"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _top_k_by_short_keys(values: Tensor, k: int) -> Tensor:
    """Indices [n, k] int64 of the k largest of each row, ascending; see the module's docstring."""

    def search(part: Tensor) -> NDArray[np.int64]:
        keys = part.contiguous().view(torch.int16).numpy()
        if part.dtype == torch.float32:
            keys = np.ascontiguousarray(keys[:, 1::2])
        return _cells_of_largest(keys, part, k)

    parts = _in_threads(search, list(values.split(_PIECE_ROWS)))
    return torch.from_numpy(np.concatenate(parts) % values.shape[1]).view(-1, k)


def _cells_of_largest(keys: NDArray[np.int16], values: Tensor, k: int) -> NDArray[np.int64]:
    """Flat cells of exactly k largest values a row; `keys` are short forms of `values` [n, L]."""
    num_rows, num_latents = keys.shape
    kth = np.partition(keys, num_latents - k, axis=1)[:, num_latents - k]
    cells = np.flatnonzero(keys >= kth[:, None])
    if len(cells) == k * num_rows:
        return cells
    # Some keys equal the k-th: the whole values decide between them, then the lower index.
    rows = cells // num_latents
    tied = keys.reshape(-1)[cells] == kth[rows]
    above = np.bincount(rows[~tied], minlength=num_rows)
    places = np.flatnonzero(tied)
    size = values.reshape(-1)[torch.from_numpy(cells[places])].float().numpy()
    order = places[np.lexsort((-size, rows[places]))]
    sorted_rows = rows[order]
    starts = np.searchsorted(sorted_rows, np.arange(num_rows))
    rank = np.arange(len(order)) - starts[sorted_rows]
    keep = np.ones(len(cells), bool)
    keep[order[rank >= k - above[sorted_rows]]] = False
    return cells[keep]


def _top_k_by_groups(values: Tensor, k: int) -> Tensor:
    """Indices [n, k] of the k largest of each row.

    Latents are dealt into groups of stride L / G. The k largest values lie in the k groups with
    the largest maxima (a group outside has k maxima above all it holds), so two short selections
    replace one over L; the result is exact and about twice as fast as one `topk`.
    """
    num_latents = values.shape[1]
    groups = _group_size(num_latents, k)
    if groups == 1:
        return values.topk(k, dim=1, sorted=False).indices
    members = values.view(-1, groups, num_latents // groups)
    best = members.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = members.gather(2, best[:, None].expand(-1, groups, -1)).flatten(1)
    place = candidates.topk(k, dim=1, sorted=False).indices
    row = torch.div(place, k, rounding_mode="floor")
    return row * (num_latents // groups) + best.gather(1, place % k)


def _group_size(num_latents: int, k: int) -> int:
    """The divisor of L nearest to sqrt(L / k), which balances the two selections."""
    ideal = math.sqrt(num_latents / k)
    sizes = [g for g in range(1, num_latents // k + 1) if num_latents % g == 0]
    return min(sizes, key=lambda g: abs(math.log(g / ideal)))


def _in_threads(search: Callable[[_Part], _Found], parts: Sequence[_Part]) -> list[_Found]:
    """numpy lets other threads run while it searches; as many do as torch would use."""
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1:
        return [search(part) for part in parts]
    return list(_pool(threads).map(search, parts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sae-selection")

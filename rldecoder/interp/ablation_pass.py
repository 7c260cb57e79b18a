"""What taking a latent out at single places does to the frozen model's next-token probabilities.

A *place* is a position at which one latent fires strongly. There its part of the residual stream,
its activation times its decoder row, is taken away, and the blocks above are run on with
everything before the position as it was (`rldecoder.lm.ablation`). Beside it stands, where asked
for, another latent that is active at the same place, taken out at the same length.

Axes: P place, K latent, V vocabulary, T position, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.interp.corpus import SplitFirings
from rldecoder.lm.ablation import PlaceReader, ReadSequence
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
LOGITS_AT_ONCE = 1 << 24
"""Logits that are in memory at a time."""
ROWS_AT_ONCE = 4096
"""Rows of the cache that are read at a time."""
HELD_BYTES = 1 << 29
"""Sequences that later passes find again."""
ROWS_PER_STEP = 8
"""Rows of the vocabulary's width that are worked on at a time."""
STARTS_AT_ONCE = 256
"""Sequences whose first tokens are run at a time: always the same ones, whichever of them are asked
for, because a product of matrices may round otherwise for another number of rows."""


class Places(NamedTuple):
    """P places, in the order of the text."""

    row: IntArray
    """[P] which latent, as a row of the firings."""
    latent: IntArray
    """[P] its number in the dictionary."""
    seq_id: IntArray
    """[P]"""
    position: IntArray
    """[P] in the sequence."""
    document: IntArray
    """[P] ids."""
    act: NDArray[np.float32]
    """[P] the latent's activation."""
    draw: FloatArray
    """[P] uniform in [0, 1): chooses the other latent."""

    def of(self, chosen: NDArray[np.bool_] | IntArray) -> Places:
        """Only some places."""
        return Places(*(column[chosen] for column in self))  # type: ignore[arg-type]


def choose_places(split: SplitFirings, least: NDArray[np.float64], count: int, seed: int) -> Places:
    """At most `count` strong firings a latent, from as many documents as there are.

    Every document sends one at random before any sends a second.

    Args:
        least: [K] least activation of each row's places.
        seed: a latent's places do not depend on which others are asked for.
    """
    grid, firings = split
    docs, valid = grid.docs.reshape(-1), grid.valid.reshape(-1)
    cells, rows, acts = [], [], []
    for row, latent in enumerate(firings.latents):
        found, values = firings.row(row)
        keep = valid[found] & (values >= least[row]) & (values > 0)
        found, values = found[keep].astype(np.int64), values[keep]

        # The turn of a place: how many of its document come before it, in a random order.
        number = np.random.default_rng([seed, int(latent)]).random(found.size)
        order = np.lexsort((number, docs[found]))
        first = np.searchsorted(docs[found][order], docs[found][order])
        turn = np.empty(found.size, np.int64)
        turn[order] = np.arange(found.size) - first
        chosen = np.lexsort((number, turn))[:count]
        cells.append(found[chosen])
        acts.append(values[chosen])
        rows.append(np.full(chosen.size, row))

    # In the order of the text, so that a sequence is read once for all its places.
    cell = np.concatenate(cells)
    owner = np.concatenate(rows)
    sequence, position = np.divmod(cell, grid.num_positions)
    order = np.lexsort((owner, cell))
    draw = np.random.default_rng(seed).random(cell.size)
    return Places(
        owner[order], firings.latents[owner][order].astype(np.int64), grid.seq_ids[sequence][order],
        position[order], docs[cell][order], np.concatenate(acts)[order], draw,
    )  # fmt: skip


class Ablated(NamedTuple):
    """Log-probabilities of some places; n of them, at S positions of one sequence.

    The next group overwrites them: memory of a vocabulary's width is taken once.
    """

    places: IntArray
    """[n] their numbers."""
    spot: Tensor
    """[n] int64, the row of `before` that is a place's."""
    before: Tensor
    """[S, V] with nothing taken out."""
    without: Tensor
    """[n, V] without the latent."""
    other: Tensor | None
    """[n, V] without another one that is active there, at the same length; as `without` where
    no other is."""
    hidden: Tensor
    """[n, 2 or 3, D] the final hidden states of all of these."""
    total: Tensor
    """[n, 2 or 3] what log-probabilities are less than logits."""


class Texts:
    """The sequences of one split at a layer, the blocks above run once over each.

    Args:
        table: columns seq_id, input_ids of the split.
        held_bytes: what is kept for the next pass, at most.
    """

    def __init__(
        self,
        lm: FrozenLM,
        layer: int,
        reader: ActivationReader,
        table: pa.Table,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.lm, self.blocks = lm, PlaceReader(lm, layer)
        self._reader, self._table, self._held_bytes = reader, table, held_bytes
        self._held: dict[int, ReadSequence] = {}
        self._bytes = 0

    def read(self, wanted: IntArray) -> Iterator[tuple[int, ReadSequence]]:
        """Sequences by increasing id; what fits into `held_bytes` is kept for the next pass."""
        missing = [seq for seq in wanted.tolist() if seq not in self._held]
        fresh = self._sequences(missing)
        for seq_id in sorted(wanted.tolist()):
            if seq_id in self._held:
                yield seq_id, self._held[seq_id]
                continue
            found, resid = next(fresh)
            assert found == seq_id
            text = self.blocks.sequence(resid)
            if self._bytes + text.num_bytes <= self._held_bytes:
                self._held[seq_id] = text
                self._bytes += text.num_bytes
            yield seq_id, text

    def _sequences(self, wanted: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Sequences with their residuals [T, D], by increasing id."""
        if not wanted:
            return
        row_of = {int(seq): row for row, seq in enumerate(self._table["seq_id"].to_numpy())}
        ids = {seq: self._ids(row_of[seq]) for seq in wanted}
        device, layer = self.lm.device, self.blocks.layer
        skipped = self._reader.meta.skip_first
        starts = self._starts([row_of[seq] for seq in wanted])

        for seq_id, pos, cached in self._cached(set(wanted)):
            length = ids[seq_id].size
            resid = torch.empty(length, self.lm.d_model, dtype=self.lm.dtype, device=device)
            resid[:skipped] = starts[row_of[seq_id]]
            known = torch.zeros(length, dtype=torch.bool)
            known[:skipped] = True
            known[pos] = True
            # Sinks further on are not cached either. Nothing after them is needed for theirs.
            if not bool(known.all()):
                last = int((~known).nonzero().max()) + 1
                here = torch.from_numpy(ids[seq_id][:last]).to(device)
                resid[:last] = self.lm.trunk(here[None], layer).resid[0]
            resid[pos.to(device)] = cached.to(resid)
            yield seq_id, resid

    def _ids(self, row: int) -> IntArray:
        """[T] tokens of a row of the table."""
        return self._table["input_ids"][row].values.to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _starts(self, rows: list[int]) -> dict[int, Tensor]:
        """The beginnings of rows of the table, which are never cached, at the layer."""
        skipped, total = self._reader.meta.skip_first, self._table.num_rows
        starts: dict[int, Tensor] = {}
        for first in sorted({row // STARTS_AT_ONCE * STARTS_AT_ONCE for row in rows}):
            part = range(first, min(first + STARTS_AT_ONCE, total))
            ids = torch.from_numpy(np.stack([self._ids(row)[:skipped] for row in part]))
            resid = self.lm.trunk(ids.to(self.lm.device), self.blocks.layer).resid
            starts |= {row: resid[row - first] for row in rows if row in part}
        return starts

    def _cached(self, wanted: set[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(sequence, positions, residuals) of the wanted sequences, in order."""
        last, first = max(wanted), self._reader.first_row(min(wanted))
        held: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in self._reader.ordered(ROWS_AT_ONCE, columns=("resid",), first=first):
            assert batch.resid is not None
            held.append((batch.seq_id, batch.pos, batch.resid))
            seq, pos, resid = (torch.cat(parts) for parts in zip(*held, strict=True))
            # The last sequence may go on in the next rows.
            for name in torch.unique_consecutive(seq)[:-1].tolist():
                if name in wanted:
                    rows = seq == name
                    yield name, pos[rows], resid[rows]
            rest = seq == seq[-1]
            held = [(seq[rest], pos[rest], resid[rest])]
            if int(seq[-1]) > last:
                return
        if held and int(held[0][0][0]) in wanted:
            yield int(held[0][0][0]), held[0][1], held[0][2]


def _normalise(logits: Tensor) -> Tensor:
    """Make logits [m, V] log-probabilities, in place; returns what was taken off each row."""
    first = logits[:, 0].clone()
    # A few rows at a time stay in the processor's own memory.
    for part in logits.split(ROWS_PER_STEP):
        part.copy_(part.log_softmax(-1))
    return first - logits[:, 0]


class Ablations:
    """Takes latents of one SAE out of the frozen model."""

    def __init__(self, texts: Texts, sae: Sae) -> None:
        self.texts, self.sae = texts, sae

    @torch.no_grad()
    def run(
        self, places: Places, *, others: bool, first: int = 0, end: int | None = None
    ) -> Iterator[Ablated]:
        """Places in order, a group at a time, which lies in one sequence.

        Args:
            others: whether other latents are taken out too.
            first: number of the place to begin at.
            end: of the one to stop before; None runs all. A sequence's places are grouped alike
                where both ends are ends of sequences.
        """
        wanted = places.seq_id[first:end]
        if not wanted.size:
            return
        each, vocabulary = 3 if others else 2, self.texts.lm.vocab_size
        size = max(4, LOGITS_AT_ONCE // (each * vocabulary))
        room = torch.empty(each * size, vocabulary, device=self.texts.lm.device)
        for seq_id, text in self.texts.read(np.unique(wanted)):
            numbers = first + np.flatnonzero(wanted == seq_id)
            for group in np.split(numbers, range(size, numbers.size, size)):
                yield self._group(text, places, group, others, room)

    def _group(
        self, text: ReadSequence, places: Places, group: IntArray, others: bool, room: Tensor
    ) -> Ablated:
        device = text.resid.device
        spots, which = np.unique(places.position[group], return_inverse=True)
        here = torch.from_numpy(places.position[group]).to(device)
        at = torch.from_numpy(spots).to(device)
        rows = self.sae.W_dec[torch.from_numpy(places.latent[group]).to(device)].float()
        own = rows * torch.from_numpy(places.act[group]).to(device)[:, None]

        # The unchanged residual goes the same way, so that rounding is the same.
        resid = [text.resid[at].float(), text.without(own, here)]
        where = [at, here]
        if others:
            resid.append(text.without(self._other(text, places, group, own), here))
            where.append(here)
        hidden = text.hidden(torch.cat(resid), torch.cat(where))
        logits = self.texts.lm.unembed(hidden, out=room[: len(hidden)])
        total = _normalise(logits)

        spot = torch.from_numpy(which).to(device)
        without, other = len(at), len(at) + len(group)
        rows = torch.arange(len(group), device=device)
        kept = torch.stack([spot, without + rows, *([other + rows] if others else [])], dim=1)
        return Ablated(
            group, spot, logits[:without], logits[without:other],
            logits[other:] if others else None, hidden[kept], total[kept],
        )  # fmt: skip

    def _other(self, text: ReadSequence, places: Places, group: IntArray, own: Tensor) -> Tensor:
        """[n, D] of another active latent each, as long as what is taken of the own one."""
        device = own.device
        here = torch.from_numpy(places.position[group]).to(device)
        acts, indices = self.sae.encode(text.resid[here].float())
        mine = torch.from_numpy(places.latent[group]).to(device)
        active = (acts > 0) & (indices != mine[:, None])
        number = active.sum(-1)
        draw = torch.from_numpy(places.draw[group]).to(device)
        turn = (draw * number).long().clamp(max=(number - 1).clamp_min(0))
        chosen = (active.cumsum(-1) == turn[:, None] + 1) & active
        slot = chosen.float().argmax(-1)
        other = indices.gather(-1, slot[:, None])[:, 0]
        other = torch.where(number > 0, other, mine)
        direction = torch.nn.functional.normalize(self.sae.W_dec[other].float(), dim=-1)
        return direction * own.norm(dim=-1, keepdim=True)

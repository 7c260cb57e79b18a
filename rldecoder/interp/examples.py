"""Examples of latents: where they fire most, across their range, and where they do not fire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.interp.corpus import Firings, TokenGrid
from rldecoder.interp.records import Example, TokenEffect
from rldecoder.interp.vocabulary import Vocabulary

EXAMPLES = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("seq_id", pa.int32()),
        ("pos", pa.int32()),
        ("act", pa.float32()),
        ("start", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("acts", pa.list_(pa.float32())),
    ]
)
"""One row an example of the `label` split. `kind`: top (strongest, at most one a window), quantile
(one drawn from each equal part of the remaining activations, strongest part first), negative (a
window in which the latent was checked not to fire). `tokens` and `acts` cover positions `start`,
`start + 1`, ...; `pos` is the position shown."""

ROWS_PER_PRODUCT = 64


class ExampleSettings:
    """Window width and how many examples of each kind."""

    def __init__(
        self, window_tokens: int, num_top: int, num_quantile: int, num_negative: int
    ) -> None:
        self.window_tokens = window_tokens
        self.num_top = num_top
        self.num_quantile = num_quantile
        self.num_negative = num_negative


def collect_examples(
    grid: TokenGrid, firings: Firings, settings: ExampleSettings, rng: np.random.Generator
) -> dict[str, list[Any]]:
    """Columns of EXAMPLES for every latent of `firings`.

    Firings must lie on valid cells of the grid. Memory: one row of activations at a time, and
    the examples themselves.
    """
    finder = _Finder(grid, settings, rng)
    columns: dict[str, list[Any]] = {name: [] for name in EXAMPLES.names}
    for row, latent in enumerate(firings.latents):
        cells, acts = firings.row(row)
        for kind, chosen in finder.choose(cells.astype(np.int64), acts).items():
            for rank, cell in enumerate(chosen):
                finder.append(columns, int(latent), kind, rank, int(cell))
        finder.forget(cells)
    return columns


class _Finder:
    """Picks cells for one latent at a time; holds that latent's activations as a dense row."""

    def __init__(
        self, grid: TokenGrid, settings: ExampleSettings, rng: np.random.Generator
    ) -> None:
        self.grid, self.settings, self.rng = grid, settings, rng
        width = settings.window_tokens
        self.per_row = -(-grid.num_positions // width)
        row, position = np.divmod(np.arange(grid.num_cells), grid.num_positions)
        self.window_of = row * self.per_row + position // width
        self.num_windows = grid.tokens.shape[0] * self.per_row
        valid = self.window_of[grid.cells]
        self.used = np.bincount(valid, minlength=self.num_windows) > 0
        self.dense = np.zeros(grid.num_cells, np.float32)

    def choose(
        self, cells: NDArray[np.int64], acts: NDArray[np.float32]
    ) -> dict[str, NDArray[np.int64]]:
        """Cells of the examples of each kind; negatives are the first valid cell of a window."""
        self.dense[cells] = acts
        order = np.argsort(-acts, kind="stable")
        _, first = np.unique(self.window_of[cells[order]], return_index=True)
        # The strongest cell of each window, strongest window first.
        peaks = cells[order[np.sort(first)]]
        top, rest = peaks[: self.settings.num_top], peaks[self.settings.num_top :]
        parts = np.array_split(rest, min(self.settings.num_quantile, rest.size) or 1)
        quantile = [int(self.rng.choice(part)) for part in parts if part.size]
        quiet = self.used.copy()
        quiet[self.window_of[cells]] = False
        windows = np.flatnonzero(quiet)
        count = min(self.settings.num_negative, windows.size)
        drawn = np.sort(self.rng.choice(windows, count, replace=False)) if count else windows[:0]
        row, part_of_row = np.divmod(drawn, self.per_row)
        start = row * self.grid.num_positions + part_of_row * self.settings.window_tokens
        return {"top": top, "quantile": np.array(quantile, np.int64), "negative": start}

    def append(
        self, columns: dict[str, list[Any]], latent: int, kind: str, rank: int, cell: int
    ) -> None:
        """Add one example. A negative shows exactly its checked window, others are centred."""
        row, pos = divmod(cell, self.grid.num_positions)
        width = self.settings.window_tokens
        start = pos if kind == "negative" else max(0, pos - width // 2)
        end = min(start + width, self.grid.num_positions)
        tokens = self.grid.tokens[row, start:end]
        base = row * self.grid.num_positions
        values = {
            "latent": latent,
            "kind": kind,
            "rank": rank,
            "seq_id": int(self.grid.seq_ids[row]),
            "pos": pos,
            "act": float(self.dense[cell]),
            "start": start,
            "tokens": tokens.tolist(),
            "acts": self.dense[base + start : base + end].tolist(),
        }
        for name, value in values.items():
            columns[name].append(value)

    def forget(self, cells: NDArray[Any]) -> None:
        """Clear the dense row for the next latent."""
        self.dense[cells] = 0


def top_examples(
    columns: dict[str, list[Any]], vocabulary: Vocabulary, count: int
) -> dict[int, list[Example]]:
    """The `count` strongest examples of each latent, as records."""
    out: dict[int, list[Example]] = {}
    for i, kind in enumerate(columns["kind"]):
        if kind == "top" and columns["rank"][i] < count:
            texts = [vocabulary.texts[t] if t >= 0 else "" for t in columns["tokens"][i]]
            out.setdefault(columns["latent"][i], []).append(
                Example(
                    seq_id=columns["seq_id"][i],
                    pos=columns["pos"][i],
                    act=columns["act"][i],
                    tokens=texts,
                    focus=columns["pos"][i] - columns["start"][i],
                )
            )
    return out


@torch.no_grad()
def token_effects(
    decoder: SaeDecoderForCausalLM,
    latents: NDArray[np.int64],
    vocabulary: Vocabulary,
    count: int,
) -> list[tuple[list[TokenEffect], list[TokenEffect]]]:
    """(promoted, suppressed) tokens of each latent: its decoder row times the unembedding.

    Only tokens with a text take part; effects are logits per unit of activation.
    """
    unembedding = decoder.frozen.lm.unembedding.float()
    named = torch.tensor([bool(text) for text in vocabulary.texts], device=unembedding.device)
    count = min(count, int(named.sum()))
    out = []
    for start in range(0, len(latents), ROWS_PER_PRODUCT):
        rows = decoder.W[torch.as_tensor(latents[start : start + ROWS_PER_PRODUCT])]
        logits = rows.float() @ unembedding.T
        up = logits.masked_fill(~named, -torch.inf).topk(count)
        down = logits.masked_fill(~named, torch.inf).topk(count, largest=False)
        for i in range(rows.shape[0]):
            out.append(
                (
                    _effects(up.values[i], up.indices[i], vocabulary),
                    _effects(down.values[i], down.indices[i], vocabulary),
                )
            )
    return out


def _effects(
    values: torch.Tensor, indices: torch.Tensor, vocabulary: Vocabulary
) -> list[TokenEffect]:
    return [
        TokenEffect(token=vocabulary.texts[token], token_id=token, effect=value)
        for value, token in zip(values.tolist(), indices.tolist(), strict=True)
    ]

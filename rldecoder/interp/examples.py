"""Examples of latents: where they fire most, across their range, and where they do not fire."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.interp.records import Example, TokenEffect
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.json_records import Row

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
window in which the latent was checked not to fire), near_miss (such a window, with tokens on which
it fires elsewhere; the most alike first). `tokens` and `acts` cover positions `start`,
`start + 1`, ...; `pos` is the position shown."""

ROWS_PER_PRODUCT = 64
NUM_NEAR_MISSES = 2
"""Near misses that a record shows."""


class ExampleSettings(NamedTuple):
    """Window width and how many examples of each kind."""

    window_tokens: int
    num_top: int
    num_quantile: int
    num_negative: int


def top_examples(table: pa.Table, vocabulary: Vocabulary, count: int) -> dict[int, list[Example]]:
    """The `count` strongest examples of each latent, as records; `table` is of EXAMPLES."""
    out: dict[int, list[Example]] = {}
    wanted = (pc.field("kind") == "top") & (pc.field("rank") < count)
    for row in table.filter(wanted).to_pylist():
        out.setdefault(row["latent"], []).append(_example(row, vocabulary))
    return out


def contrasts(table: pa.Table, vocabulary: Vocabulary) -> dict[int, list[Example]]:
    """Of each latent the middle and the lowest `quantile` example, and two near misses."""
    rows: dict[tuple[int, str], list[Row]] = {}
    for row in table.filter(pc.field("kind").isin(["quantile", "near_miss"])).to_pylist():
        rows.setdefault((row["latent"], row["kind"]), []).append(row)
    out: dict[int, list[Example]] = {}
    for (latent, kind), found in sorted(rows.items(), key=lambda item: item[0][1] == "near_miss"):
        found.sort(key=lambda row: row["rank"])
        if kind == "quantile":
            kept = [found[place] for place in sorted({len(found) // 2, len(found) - 1})]
        else:
            kept = found[:NUM_NEAR_MISSES]
        out.setdefault(latent, []).extend(_example(row, vocabulary) for row in kept)
    return out


def _example(row: Row, vocabulary: Vocabulary) -> Example:
    return Example(
        seq_id=row["seq_id"],
        pos=row["pos"],
        act=row["act"],
        tokens=[vocabulary.texts[t] if t >= 0 else "" for t in row["tokens"]],
        focus=row["pos"] - row["start"],
        kind=row["kind"],
    )


@torch.no_grad()
def token_effects(
    decoder: SaeDecoderForCausalLM, latents: NDArray[np.int64], vocabulary: Vocabulary, count: int
) -> list[tuple[list[TokenEffect], list[TokenEffect]]]:
    """(promoted, suppressed) tokens of each latent: its decoder row times the unembedding.

    Only tokens with a text take part; effects are logits per unit of activation. Of a decoder with
    blocks it is the row's own way past them (`SaeDecoderForCausalLM.direct`).
    """
    unembedding = decoder.frozen.lm.unembedding.float()
    named = torch.tensor([bool(text) for text in vocabulary.texts], device=unembedding.device)
    count = min(count, int(named.sum()))
    out = []
    for start in range(0, len(latents), ROWS_PER_PRODUCT):
        rows = decoder.direct(torch.as_tensor(latents[start : start + ROWS_PER_PRODUCT]))
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

"""Does a model want its beginning-of-text token? Measured: text with it in front, and without.

Gemma 7B has a perplexity of 5.9e9 without and of 3.5 with it; and the position that holds it is the
attention sink that SAEs of others leave out. Nothing else in a run would tell.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rldecoder.config.data import Bos
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import encode_documents
from rldecoder.schemas import JsonRecord, Scalar

_WINDOWS, _LENGTH = 4, 128
"""Windows of text and their tokens; fewer where the model reads less."""
_CLEARLY = 0.1
"""Nats a token by which the other way must be better for a warning."""


class BosRecord(JsonRecord):
    """Cross-entropy of plain English with a beginning-of-text token in front, and without."""

    setting: Bos
    """`ingest.bos`."""
    in_front: tuple[int, ...]
    """Tokens that stand before every text of this run; empty: none."""
    measured: tuple[int, ...]
    """Tokens that were put in front to measure: those, or the tokenizer's BOS token; empty where
    it has none, and nothing was measured."""
    windows: int
    """Pieces of text."""
    tokens: int
    """Predictions, the same with and without: all of the text but its first token."""
    cross_entropy_with: float | None
    """Nats a token with the tokens in front; None where they or the text are missing, or where the
    model's numbers are not finite."""
    cross_entropy_without: float | None
    """Nats a token of the text alone."""

    @property
    def worse_by(self) -> float:
        """Nats a token that the run's way costs more than the other one; 0 where unknown."""
        with_bos, without = self.cross_entropy_with, self.cross_entropy_without
        if with_bos is None or without is None:
            return 0.0
        return with_bos - without if self.in_front else without - with_bos

    @property
    def warning(self) -> str | None:
        """What people should know, if the run's way is clearly the worse one."""
        if self.worse_by <= _CLEARLY:
            return None
        here, other = ("with", "without") if self.in_front else ("without", "with")
        return (
            f"Text costs the model {self.worse_by:.2f} nats a token more {here} its "
            f"beginning-of-text token than {other}: `ingest.bos: "
            f"{'never' if self.in_front else 'always'}` may be what it was trained with."
        )

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest; nothing where no text begins with such a token."""
        if not self.in_front:
            return {}
        return {"bos_cross_entropy": self.cross_entropy_with, "bos_saves": -self.worse_by}


@torch.no_grad()
def measure_bos(lm: FrozenLM, setting: Bos) -> BosRecord:
    """Read a few windows of plain English both ways.

    Args:
        lm: the model, its tokenizer as the run has it.
        setting: `ingest.bos`.
    """
    bos = lm.tokenizer.bos_token_id
    measured = lm.front or (() if bos is None else (int(bos),))
    ids = _windows(lm, len(measured)) if measured else torch.zeros(0, 0, dtype=torch.long)
    with_bos = without = None
    if ids.numel():
        with_bos, without = _cross_entropy(lm, ids, measured), _cross_entropy(lm, ids, ())
    return BosRecord(
        setting=setting,
        in_front=lm.front,
        measured=measured,
        windows=len(ids),
        tokens=ids[:, 1:].numel(),
        cross_entropy_with=with_bos,
        cross_entropy_without=without,
    )


def _windows(lm: FrozenLM, front: int) -> Tensor:
    """Token ids [S, T] of the language reference of Python; none where a model reads too little."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("class", "exceptions", "strings"))
    (tokens,) = encode_documents(lm.tokenizer, [text])
    length = min(_LENGTH, lm.context_length - front)
    tokens = tokens[: _WINDOWS * length]
    if length < 2 or len(tokens) < _WINDOWS * length or max(tokens) >= lm.vocab_size:
        return torch.zeros(0, 0, dtype=torch.long)
    return torch.tensor(tokens, device=lm.device).view(_WINDOWS, length)


def _cross_entropy(lm: FrozenLM, ids: Tensor, front: Sequence[int]) -> float | None:
    before = torch.tensor([*front], dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
    total = 0.0
    for row in torch.cat([before, ids], dim=1):
        _, final = lm.resid_and_final(row[None], 0)
        logits = lm.unembed(final[0, len(front) : -1])
        total += F.cross_entropy(logits, row[len(front) + 1 :], reduction="sum").item()
    mean = total / ids[:, 1:].numel()
    return mean if mean < float("inf") else None

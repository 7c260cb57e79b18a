"""Distillation losses and held-out faithfulness, without ever holding [N, V] logits for all N.

For one position let z = U h be the decoder's logits and p = softmax of them, q the frozen
model's distribution and y the next token. Then

    d KL(q || p) / dz = p - q        d CE(y, p) / dz = p - onehot(y)

so the gradient with respect to the predicted hidden state h is one product with U, known as
soon as the logits are. It is computed chunk by chunk in the forward pass and no graph is kept.

Axes: N tokens, D model width, V vocabulary. All losses are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rldecoder.config.decoder import MatmulPrecision
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.lm.frozen import FrozenLM

NO_LABEL = -100
"""The label of a position whose next token is unknown (the last one of a sequence)."""

# One float32 buffer of logits. Buffers of 32 MiB and more are mapped anew by malloc every time,
# and the page faults then cost more than the softmax (measured: 36 -> 100 us a token).
CHUNK_BYTES = 30 << 20
KEPT_BYTES = 100 << 20
"""One buffer of `LogitBuffers.kept`."""


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Set torch's float32 matmul precision for a while.

    `medium` multiplies in bfloat16 and accumulates and returns float32 (on CPUs with AMX about
    3 times faster); on hardware without it nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def chunk_rows(vocab_size: int) -> int:
    """How many rows of float32 logits fit `CHUNK_BYTES`."""
    return max(16, CHUNK_BYTES // (4 * vocab_size))


class TokenLosses(NamedTuple):
    """Losses of N tokens, float32."""

    loss: Tensor
    """[N], (1 - ce_weight) * kl + ce_weight * ce; differentiable in the predicted hidden."""
    kl: Tensor
    """[N], KL(frozen || decoder); detached."""
    ce: Tensor
    """[N], cross-entropy to the next token, 0 where it is unknown; detached."""
    choices: Tensor | None
    """[N] int64, the decoder's likeliest tokens, where they were asked for."""


class LogitBuffers:
    """Memory for chunks of logits, used again and again.

    Large chunks multiply faster: each product reads the whole unembedding. But malloc maps so
    large a buffer anew every time, and the page faults cost more than is won, so it is kept.

    Args:
        rows: of logits that live at once, in four buffers.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._held: Tensor | None = None

    @classmethod
    def kept(cls, vocab_size: int) -> LogitBuffers:
        """As large as pays for training; about 400 MB for four."""
        return cls(max(32, KEPT_BYTES // (4 * vocab_size) // 32 * 32))

    def take(
        self, rows: int, vocab_size: int, device: torch.device
    ) -> list[Float[Tensor, "_ vocab"]]:
        """Four tensors [rows, V] float32 of anything."""
        held = self._held
        if held is None or held.shape[1] < rows or held.shape[2] != vocab_size:
            held = self._held = torch.empty(4, rows, vocab_size, device=device)
        return list(held[:, :rows].unbind())


class _ChunkedLoss(torch.autograd.Function):
    """Losses of all tokens, and their gradient, one chunk of logits at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_pred: Tensor,
        hidden_frozen: Tensor,
        labels: Tensor,
        lm: FrozenLM,
        ce_weight: float,
        buffers: LogitBuffers,
        want_choices: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        num_tokens, device = len(hidden_pred), hidden_pred.device
        kl = torch.empty(num_tokens, device=device)
        ce = torch.empty_like(kl)
        choices = None
        if want_choices:
            choices = torch.empty(num_tokens, dtype=torch.long, device=device)
        grad = torch.empty_like(hidden_pred) if ctx.needs_input_grad[0] else None
        rows = math.ceil(num_tokens / max(1, math.ceil(num_tokens / buffers.rows)))
        for start in range(0, num_tokens, rows):
            part = slice(start, min(start + rows, num_tokens))
            held = buffers.take(part.stop - start, lm.vocab_size, device)
            logits = lm.unembed(hidden_pred[part], out=held[0])
            frozen_logits = lm.unembed(hidden_frozen[part], out=held[1])
            if choices is not None:
                choices[part] = logits.argmax(-1)
            kl[part], ce[part], logit_grad, scale = _losses_and_logit_grad(
                logits, frozen_logits, labels[part], ce_weight, held[2:]
            )
            if grad is not None:
                grad[part] = lm.unembed_gradient(logits, logit_grad) * scale
        if grad is not None:
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(kl, ce, *(() if choices is None else (choices,)))
        return (1 - ce_weight) * kl + ce_weight * ce, kl, ce, choices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0][:, None], None, None, None, None, None, None


def _losses_and_logit_grad(
    logits: Tensor, frozen_logits: Tensor, labels: Tensor, ce_weight: float, room: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL [n], CE [n], and d loss / d logits as [n, V] times [n, 1].

    Logits do not fit the cache: every pass over them that is saved counts. Overwrites
    `frozen_logits` and both tensors of `room`, each [n, V].
    """
    has_label = labels != NO_LABEL
    safe_labels = labels.clamp_min(0)[:, None]
    probs, lse = softmax_and_lse(logits, out=room[0])
    frozen_probs, frozen_lse = softmax_and_lse(frozen_logits, out=room[1])
    ce = torch.where(has_label, lse - logits.gather(-1, safe_labels)[:, 0], 0.0)
    kl = frozen_logits.sub_(logits).mul_(frozen_probs).sum(-1) - frozen_lse + lse
    label_weight = (ce_weight * has_label)[:, None]
    scale = (1 - ce_weight + label_weight).clamp_min(1e-30)  # 0: CE alone, and no label
    grad = torch.addcmul(probs, frozen_probs, (ce_weight - 1) / scale, out=probs)
    grad.scatter_add_(-1, safe_labels, -label_weight / scale)
    return kl, ce, grad, scale


def softmax_and_lse(
    logits: Float[Tensor, "tokens vocab"], *, out: Float[Tensor, "tokens vocab"] | None = None
) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, " tokens"]]:
    """Softmax [n, V] and logsumexp [n] of logits [n, V] with one exponentiation.

    The largest probability is exp(largest logit - lse), which gives lse without a second pass.
    """
    probs = torch.softmax(logits, -1, out=out)
    return probs, logits.amax(-1) - probs.amax(-1).log()


def chunked_kl_ce(
    hidden_pred: Float[Tensor, "tokens d_model"],
    hidden_frozen: Float[Tensor, "tokens d_model"],
    lm: FrozenLM,
    *,
    labels: Int[Tensor, " tokens"] | None = None,
    ce_weight: float = 0.0,
    buffers: LogitBuffers | None = None,
    choices: bool = False,
) -> TokenLosses:
    """Distillation losses of N tokens through the frozen unembedding, memory flat in N.

    Costs three products with U: two for the logits, one for the gradient.

    Args:
        hidden_pred: [N, D] float32, the decoder's final hidden states.
        hidden_frozen: [N, D], the frozen model's (any float dtype).
        lm: its `unembed` makes logits of both; it gets no gradient.
        labels: [N] int64 next tokens, `NO_LABEL` where unknown; None: all unknown.
        ce_weight: share of CE in the loss, 0 to 1.
        buffers: where logits live, for callers that come again (default: chunks of `CHUNK_BYTES`).
        choices: whether the decoder's likeliest tokens are wanted too.
    """
    if labels is None:
        labels = torch.full((len(hidden_pred),), NO_LABEL, device=hidden_pred.device)
    buffers = buffers or LogitBuffers(chunk_rows(lm.vocab_size))
    return TokenLosses(
        *_ChunkedLoss.apply(hidden_pred, hidden_frozen, labels, lm, ce_weight, buffers, choices)
    )


class NextTokens:
    """The next token of cached positions of a split.

    The token after (seq_id, pos) is the cached one at (seq_id, pos + 1); the last position of a
    sequence has none.

    Args:
        first: number of the row to begin at, in (seq_id, pos) order.
        end: number of the row after the last one; None: all. The table holds these rows alone.
    """

    def __init__(self, reader: ActivationReader, first: int = 0, end: int | None = None) -> None:
        self._length = reader.meta.context_length
        # The token after the last row is in the row behind it.
        most = None if end is None else end + 1
        ids = list(reader.ordered(1 << 20, columns=(), first=first, max_tokens=most))
        seq_id = torch.cat([batch.seq_id for batch in ids])
        pos = torch.cat([batch.pos for batch in ids])
        token_id = torch.cat([batch.token_id for batch in ids])
        # Sequence ids of a split may start anywhere; only their range matters for the table.
        self._first = int(seq_id.min())
        num_sequences = int(seq_id.max()) - self._first + 1
        self._table = torch.full((num_sequences * self._length + 1,), NO_LABEL)
        has_previous = pos > 0
        key = self._key(seq_id[has_previous], pos[has_previous] - 1)
        self._table[key] = token_id[has_previous].long()

    def _key(self, seq_id: Tensor, pos: Tensor) -> Tensor:
        return (seq_id.long() - self._first) * self._length + pos.long()

    def labels(
        self, seq_id: Int[Tensor, " tokens"], pos: Int[Tensor, " tokens"]
    ) -> Int[Tensor, " tokens"]:
        """Next tokens [N] int64 of positions [N], `NO_LABEL` where there is none."""
        return self._table[self._key(seq_id, pos)]

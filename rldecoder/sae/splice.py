"""What the rest of the frozen model makes of an SAE's reconstruction (splice KL, CE recovered)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.sinks import is_sink

ROWS_AT_ONCE = 256
"""Tokens whose logits are held at once: at a vocabulary of 50k, 50 MB a float32 tensor."""


class SpliceQuality(NamedTuple):
    """Effect of one replacement of the residual stream; nats per token."""

    kl: float
    """Mean KL(frozen || spliced)."""
    ce: float
    """Mean cross-entropy of the next token."""
    agreement: float
    """Share of tokens with the frozen model's most likely next token."""


class SpliceReport(NamedTuple):
    """Every replacement on the same tokens."""

    frozen_ce: float
    replaced: dict[str, SpliceQuality]
    num_tokens: int
    """Tokens over which KL is averaged."""

    def ce_recovered(self, name: str, ablation: str) -> float | None:
        """Share of the CE lost to `ablation` that `name` wins back; None if it loses nothing."""
        lost = self.replaced[ablation].ce - self.frozen_ce
        if lost <= 0:
            return None
        return (self.replaced[ablation].ce - self.replaced[name].ce) / lost


@torch.inference_mode()
def splice_quality(
    lm: FrozenLM,
    input_ids: Int[Tensor, "sequences length"],
    layer: int,
    replacements: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    batch: int = 4,
    advance: Callable[[int], None] = lambda sequences: None,
) -> SpliceReport:
    """Replace the residual stream at `layer` and compare next-token distributions.

    Position 0 keeps its residual in every replacement and is left out of all means: it is the
    attention sink, of another scale than all other positions, and SAEs do not see it in training.
    A sink that forms at another position keeps its residual too. The blocks below `layer` run
    once for all replacements.

    Args:
        input_ids: [S, T] full sequences without padding, T >= 3.
        layer: blocks before the hook point.
        replacements: name -> function of residuals [B, T - 1, D] to the same shape.
        advance: called with the number of sequences done.

    Raises:
        BadInputError: the sequences are too short or there are none.
    """
    if input_ids.ndim != 2 or not len(input_ids) or input_ids.shape[1] < 3:
        raise BadInputError(
            f"Splice metrics need sequences of 3 tokens or more, got {tuple(input_ids.shape)}.",
            "The test split is empty or its context is too short.",
            "Raise `ingest.context_length` or the test split's share.",
        )
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in replacements}
    frozen_ce, num_kl, num_ce = 0.0, 0, 0

    for start in range(0, len(input_ids), batch):
        ids = input_ids[start : start + batch].to(lm.device)
        resid = lm.trunk(ids, layer).resid
        frozen = lm.tail(resid, layer)[:, 1:]
        targets = F.pad(ids[:, 2:], (0, 1), value=-100)
        ce, _ = _compare(lm, frozen, frozen, targets)
        frozen_ce += ce
        num_kl += targets.numel()
        num_ce += int((targets >= 0).sum())

        # Sinks stay as they are: no SAE has learnt them, and all later positions read them.
        read = resid[:, 1:].flatten(0, 1)
        kept = is_sink(read, ids[:, 1:].flatten(), lm.front).view(len(ids), -1, 1)
        for name, replace in replacements.items():
            replaced = torch.where(kept, resid[:, 1:], replace(resid[:, 1:]).to(resid.dtype))
            changed = torch.cat([resid[:, :1], replaced], dim=1)
            ce, rest = _compare(lm, frozen, lm.tail(changed, layer)[:, 1:], targets)
            sums[name] += torch.tensor([rest[0], ce, rest[1]], dtype=torch.float64)
        advance(len(ids))

    qualities = {
        name: SpliceQuality(float(kl) / num_kl, float(ce) / num_ce, float(agree) / num_kl)
        for name, (kl, ce, agree) in sums.items()
    }
    return SpliceReport(frozen_ce / num_ce, qualities, num_kl)


def _compare(
    lm: FrozenLM, frozen: Tensor, other: Tensor, targets: Tensor
) -> tuple[float, tuple[float, float]]:
    """Sums over tokens: CE of `other`, then KL(frozen || other) and equal most likely tokens."""
    ce = kl = agree = 0.0
    rows = zip(
        frozen.flatten(0, 1).split(ROWS_AT_ONCE),
        other.flatten(0, 1).split(ROWS_AT_ONCE),
        targets.flatten().split(ROWS_AT_ONCE),
        strict=True,
    )
    for frozen_rows, other_rows, target in rows:
        logprobs = F.log_softmax(lm.unembed(other_rows).float(), dim=-1)
        ce += float(F.nll_loss(logprobs, target, ignore_index=-100, reduction="sum"))
        if other is frozen:
            continue
        reference = F.log_softmax(lm.unembed(frozen_rows).float(), dim=-1)
        kl += float(F.kl_div(logprobs, reference, log_target=True, reduction="sum"))
        agree += float((logprobs.argmax(-1) == reference.argmax(-1)).sum())
    return ce, (kl, agree)

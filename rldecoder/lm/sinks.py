"""Attention sinks: tokens whose residual is of another size than all others.

Language models park attention on a few tokens, most often the first of a sequence, and give them
"massive activations" (Sun et al. 2024, arXiv 2402.17762). On SmolLM2-135M at layer 24 the first
position is always one; in about one sequence of 30 a second one forms at position 1. Those, 13 of
104,040 tokens, held 46 % of all variance, so that fvu and lens fits spoke of little else.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

SKIP_FIRST = 1
"""Positions that are left out at the start of every sequence."""

SINK_NORM_RATIO = 10.0
"""A residual this many times as long as the median one is a sink's. Ordinary tokens reach 2.6."""


def is_sink(resid: Tensor, token_ids: Tensor | None = None, front: Collection[int] = ()) -> Tensor:
    """Which of N residuals [N, D] are sinks: [N] bool. NaN is none: others refuse it.

    Args:
        resid: [N, D].
        token_ids: [N], the tokens there.
        front: those that begin a text (`FrozenLM.front`). A text that begins inside a packed
            sequence is read like one at its start, where they are sinks: they count as such.
    """
    norms = resid.float().norm(dim=1)
    found = norms > SINK_NORM_RATIO * norms.nanmedian()
    if token_ids is None or not front:
        return found
    begins = torch.isin(token_ids, torch.tensor([*front], device=token_ids.device))
    return found | begins.to(found.device)

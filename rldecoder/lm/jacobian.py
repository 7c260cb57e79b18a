"""The Jacobian lens: what a layer's residual moves in the model's last residual, on average.

    lens_l(h) = softmax(U norm(J_l h)),    J_l = mean over positions t of d h_final[t] / d h_l[t]

h_l is the residual stream after l blocks, h_final the one before the final norm. Source: Gurnee,
Sofroniew, Lindsey et al. 2026, "Verbalizable Representations Form a Global Workspace in Language
Models", with github.com/anthropics/jacobian-lens. They sum over the targets t' >= t; their code
says that the mean over t' = t, taken here, works as a lens as well. It is the one that speaks of
the next token, which all lenses are measured by, and what stands before t is then a constant: its
keys and values are cached, so that a backward pass reads one token instead of a whole text.

Each sampled Jacobian is exact: a backward pass for each dimension of h_final, for all layers
together. Copies of a position take several dimensions at a time, since a pass of few tokens does
little but fetch the weights. A randomised estimator would save nothing: from n random cotangents it
is off by sqrt(D / n), so that with D of them the error is as large as what is found. What is
estimated is the mean over positions, and `relative_error` is its standard error.

Axes: P positions, S tokens of a context, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rldecoder.errors import BadInputError, NumericalError
from rldecoder.lm.cut import choose_rows, keeps_states, replaced_input
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.placement import is_offloaded

CONTEXT = 64
"""Tokens that the model has read at a sampled position, that one included, at most."""

POSITIONS_AT_ONCE = 16
"""Jacobians taken together: their caches and graphs are in memory at one time."""

TOKENS_AT_ONCE = 128
"""Copies of positions in a backward pass (measured: three times as fast as a copy each)."""


class JacobianMap(NamedTuple):
    """`h_final ~= J @ h_l`."""

    J: Tensor
    """[D, D] float32; a row for each dimension of h_final."""
    positions: int
    """Over which it is the mean."""
    relative_error: float
    """Standard error of J over positions, |SE| / |J| in the Frobenius norm."""

    def __call__(self, lm: FrozenLM, resid: Tensor) -> Tensor:
        """Predicted final hidden state [B, T, D] for residuals [B, T, D] of the layer."""
        with torch.no_grad():
            return lm.tail(resid.float() @ self.J.T, lm.num_layers)


def obstacle(lm: FrozenLM, layer: int) -> str | None:
    """Why no Jacobian from `layer` can be taken of this model; None where it can."""
    if is_offloaded(lm.model):
        return "blocks are offloaded, and no gradient goes through them"
    if keeps_states(lm.base.config):
        return "some blocks keep states that they overwrite, so that no gradient goes back"
    try:
        lm.tail_cache(layer)
    except BadInputError as error:
        return f"above layer {layer} blocks keep no cache ({error.why})"
    return None


def draw_contexts(
    input_ids: Tensor, count: int, generator: torch.Generator, front: Sequence[int] = ()
) -> Tensor:
    """Contexts [count, S] that end at positions drawn from sequences [N, T].

    S is `CONTEXT`, or half of T where that is less, so that positions differ in what they follow.

    Args:
        input_ids: [N, T] tokens of text that nothing is measured on.
        count: P; a position is drawn once as long as there are enough.
        generator: draws them.
        front: tokens that begin a text (`FrozenLM.front`): sinks, at which no context ends.
    """
    length = max(1, min(CONTEXT, input_ids.shape[1] // 2))
    windows = input_ids.unfold(1, length, 1).flatten(0, 1)
    begins = torch.isin(windows[:, -1], torch.tensor([*front], dtype=windows.dtype))
    usual = torch.nonzero(~begins)[:, 0]
    order = torch.cat(
        [torch.randperm(len(usual), generator=generator) for _ in range(-(-count // len(usual)))]
    )
    return windows[usual[order[:count]]]


class JacobianSums(NamedTuple):
    """Over the Jacobians of some positions."""

    total: Tensor
    """[D, D] float32, their sum."""
    squares: Tensor
    """[R] float64: squared entries, a term for each backward pass."""

    def plus(self, other: JacobianSums) -> JacobianSums:
        """Over both, as one pass over them adds up."""
        return JacobianSums(self.total + other.total, torch.cat([self.squares, other.squares]))

    def mean(self, count: int) -> JacobianMap:
        """The mean of all `count` Jacobians.

        Raises:
            NumericalError: a gradient was NaN or infinite.
        """
        mean = self.total / count
        norm = float(mean.double().norm())
        variance = max(0.0, reduce(add, self.squares.tolist()) - count * norm**2) / (count - 1)
        error = (variance / count) ** 0.5 / norm if norm else float("nan")
        if error != error or error == float("inf"):
            raise NumericalError(
                "The Jacobian lens could not be computed.",
                f"The mean of {count} Jacobians has norm {norm:g}.",
                "Check the model's weights, or set `baselines.jacobian_positions: 0`.",
            )
        return JacobianMap(mean, count, error)


def jacobian_sums(
    lm: FrozenLM, layers: Sequence[int], contexts: Tensor, advance: Callable[[float], object]
) -> dict[int, JacobianSums]:
    """The Jacobians of each layer over contexts [P, S], P at most `POSITIONS_AT_ONCE`.

    Args:
        advance: called with rows of all Jacobians, as they are done.
    """
    shape = (lm.d_model, lm.d_model)
    sums = {layer: torch.zeros(shape, device=lm.device) for layer in layers}
    squares: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    copies = min(lm.d_model, max(1, TOKENS_AT_ONCE // len(contexts)))
    resids, final = _graph(lm, layers, contexts.to(lm.device), copies)
    for rows in torch.arange(lm.d_model, device=lm.device).split(copies):
        # Copy c of every position is asked about dimension rows[c]: their graphs do not meet.
        wanted = torch.zeros_like(final)
        wanted[: len(rows)] = one_hot(rows, lm.d_model)[:, None].to(final)
        grads = torch.autograd.grad(final, [*resids.values()], wanted, retain_graph=True)
        for layer, grad in zip(resids, grads, strict=True):
            found = grad[: len(rows)].float()
            sums[layer][rows] += found.sum(1)
            squares[layer].append(found.double().square().sum())
        advance(len(contexts) * len(rows))
    return {layer: JacobianSums(sums[layer], torch.stack(squares[layer])) for layer in layers}


def _graph(
    lm: FrozenLM, layers: Sequence[int], ids: Tensor, copies: int
) -> tuple[dict[int, Tensor], Tensor]:
    """Residuals by layer and h_final, [copies, P, D] each, at the last of the tokens [P, S].

    All hang together in one graph, in which the earlier tokens are constants.
    """
    lowest = min(layers)
    resid = lm.trunk(ids, lowest).resid
    past = lm.tail_cache(lowest)
    if resid.shape[1] > 1:
        with torch.no_grad():
            lm.tail(resid[:, :-1], lowest, past_key_values=past)

    # A fresh leaf at the lowest layer; the others are met on the way up, as views by copy.
    choose_rows(past, torch.arange(len(ids)).repeat(copies))
    leaf = resid[:, -1].detach().repeat(copies, 1, 1).requires_grad_()
    seen = {lowest: leaf}
    with ExitStack() as hooks, torch.enable_grad():
        for layer in sorted({*layers, lm.num_layers} - {lowest}):

            def keep(met: Tensor, layer: int = layer) -> Tensor:
                seen[layer] = met.view_as(leaf)
                return seen[layer].view_as(met)

            hooks.enter_context(replaced_input(lm.part_after(layer), keep))
        lm.tail(leaf.view(-1, 1, lm.d_model), lowest, past_key_values=past)
    return {layer: seen[layer] for layer in layers}, seen[lm.num_layers]

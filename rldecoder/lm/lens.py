"""Lenses: what a layer's residual already says about the model's last hidden state.

Logit lens: the final norm and the unembedding, applied early (nostalgebraist 2020). Affine lens:
the best affine map from the residual to the final normed hidden state, then the unembedding
(Belrose et al. 2023, arXiv 2303.08112, here in closed form instead of by gradient descent). The
Jacobian lens is in `rldecoder.lm.jacobian`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from rldecoder.errors import NumericalError
from rldecoder.lm.frozen import FrozenLM

LENS = pa.schema(
    [
        ("layer", pa.int32()),
        ("lens", pa.string()),
        ("split", pa.string()),
        ("accuracy", pa.float64()),
        ("agreement", pa.float64()),
        ("kl", pa.float64()),
        ("ce", pa.float64()),
    ]
)
"""Next-token metrics of each layer's lenses: `lens` is logit, affine or jacobian; kl =
KL(frozen || lens) and ce in nats per token."""

RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""Penalties tried where a configuration names none."""


class AffineMap(NamedTuple):
    """`final_hidden ~= resid @ A + c`."""

    A: Tensor
    """[D, D] float32."""
    c: Tensor
    """[D] float32."""
    strength: float
    """Ridge penalty relative to the variance of each input dimension."""

    def __call__(self, resid: Tensor) -> Tensor:
        """Predicted final hidden state [..., D] in float32."""
        return resid.float() @ self.A + self.c


_SUMS = ("x", "y", "xx", "xy")


class Moments:
    """Sums over tokens that a least-squares fit needs, in float64: x = residual, y = target.

    A residual's largest dimension is hundreds of times the others, so float32 sums would lose
    the small ones.
    """

    def __init__(self, d_model: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.x, self.y = (torch.zeros(d_model, dtype=torch.float64, device=device) for _ in "xy")
        self.xx, self.xy = (
            torch.zeros(d_model, d_model, dtype=torch.float64, device=device) for _ in "xy"
        )
        self.yy = 0.0
        """Sum of squared targets."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add N tokens: x and y are [N, D], of any float dtype."""
        x, y = x.to(self.x), y.to(self.x)
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(y.square().sum())

    def merge(self, other: Moments) -> None:
        """Add the sums over other tokens: one term, which rounds once."""
        self.count += other.count
        self.yy += other.yy
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def state(self) -> dict[str, Tensor]:
        """All of it, on the CPU."""
        scalars = torch.tensor([self.count, self.yy], dtype=torch.float64)
        return {"scalars": scalars} | {name: getattr(self, name).cpu() for name in _SUMS}

    @classmethod
    def restored(cls, state: Mapping[str, Tensor]) -> Moments:
        """What `state` gave."""
        found = cls(0)
        count, found.yy = state["scalars"].tolist()
        found.count = int(count)
        for name in _SUMS:
            setattr(found, name, state[name])
        return found


def fit_affine(moments: Moments, strength: float) -> AffineMap:
    """Ridge regression with an unpenalised constant, from the sums alone.

    Minimises sum |x A + c - y|^2 + strength * n * sum_i var(x_i) |A_i|^2: as if the inputs had
    been scaled to unit variance, so that one strength suits dimensions of any size.

    Raises:
        NumericalError: if there are no tokens, or they hold NaN or infinity.
    """
    count = moments.count
    if count == 0 or not bool(torch.isfinite(moments.xx).all() and math.isfinite(moments.yy)):
        raise NumericalError(
            f"The affine lens could not be fitted on {count} tokens.",
            "There are none, or the residuals hold NaN or infinity.",
            "Check the model's weights, and `baselines.fit_tokens`.",
        )
    mean_x, mean_y = moments.x / count, moments.y / count
    covariance = moments.xx - count * torch.outer(mean_x, mean_x)
    cross = moments.xy - count * torch.outer(mean_x, mean_y)
    variance = covariance.diagonal().clamp_min(0)
    # A constant dimension has no variance; the floor keeps the system solvable.
    penalty = strength * variance + 1e-12 * variance.mean() + 1e-30
    A = torch.linalg.solve(covariance + torch.diag(penalty), cross)
    c = mean_y - mean_x @ A
    return AffineMap(A.float(), c.float(), strength)


def mean_squared_error(moments: Moments, lens: AffineMap) -> float:
    """Mean over tokens of |x A + c - y|^2 on the tokens of `moments`, without seeing them."""
    A, c = lens.A.double(), lens.c.double()
    predicted = ((moments.xx @ A) * A).sum() + 2 * (moments.x @ A) @ c + moments.count * (c @ c)
    product = (moments.xy * A).sum() + moments.y @ c
    return float(predicted - 2 * product + moments.yy) / moments.count


def choose_affine(train: Moments, validation: Moments, strengths: Sequence[float]) -> AffineMap:
    """The fit on `train` whose error on `validation` is least over the strengths."""
    return min(
        (fit_affine(train, strength) for strength in strengths),
        key=lambda lens: mean_squared_error(validation, lens),
    )


def logit_lens(lm: FrozenLM, resid: Tensor) -> Tensor:
    """The final norm applied to residuals [B, T, D] of any layer."""
    with torch.no_grad():
        return lm.tail(resid, lm.num_layers)


class FrozenPredictions(NamedTuple):
    """The frozen model's next-token distributions of N tokens; every lens is compared to them."""

    logprobs: Tensor
    """[N, V] float32."""
    probs: Tensor
    """[N, V] float32."""
    guess: Tensor
    """[N] most likely tokens."""
    targets: Tensor
    """[N] the tokens that came next."""

    @classmethod
    def of(cls, logprobs: Tensor, targets: Tensor) -> FrozenPredictions:
        """From log-probabilities [N, V] and next tokens [N]."""
        return cls(logprobs, logprobs.exp(), logprobs.argmax(-1), targets)


class PredictionSums:
    """Next-token metrics of one predictor, in double precision: a term each time that some tokens
    are added, so that other processes' terms round as if they had been added here."""

    def __init__(self) -> None:
        self.terms: list[tuple[float, ...]] = []
        """Tokens, and the sums of correct, agreeing, KL and CE over them."""

    def add(self, logprobs: Tensor, frozen: FrozenPredictions) -> None:
        """Add N tokens with the predictor's log-probabilities [N, V], float32."""
        guess, targets = logprobs.argmax(-1), frozen.targets
        kl = (frozen.probs * (frozen.logprobs - logprobs)).sum(-1)
        self.terms.append(
            (
                len(targets),
                int((guess == targets).sum()),
                int((guess == frozen.guess).sum()),
                float(kl.double().sum()),
                -float(logprobs.gather(-1, targets[:, None]).double().sum()),
            )
        )

    def means(self) -> PredictionMeans:
        """The metrics.

        Raises:
            NumericalError: if they are not finite.
        """
        # One by one: `sum` of Python rounds otherwise.
        count, *totals = reduce(
            lambda a, b: tuple(map(add, a, b)), self.terms, (0.0, 0.0, 0.0, 0.0, 0.0)
        )
        values = [value / max(1, count) for value in totals]
        if count == 0 or not all(math.isfinite(value) for value in values):
            raise NumericalError(
                "Next-token metrics are not finite.",
                f"{count:.0f} tokens gave accuracy, agreement, KL and CE {values}.",
                "Check the model's weights, or use float32 as its `compute_dtype`.",
            )
        return PredictionMeans(*values)


class PredictionMeans(NamedTuple):
    """Next-token metrics over a split."""

    accuracy: float
    """Share of tokens whose most likely token is the next one."""
    agreement: float
    """Share of tokens where it is the frozen model's most likely one."""
    kl: float
    """Mean KL(frozen || predictor), nats per token."""
    ce: float
    """Mean cross-entropy of the next token, nats."""


@torch.no_grad()
def compare_predictions(
    lm: FrozenLM,
    final_hidden: Tensor,
    predicted: Mapping[str, Tensor],
    targets: Tensor,
    sums: Mapping[str, PredictionSums],
    chunk_tokens: int,
) -> None:
    """Add N tokens to the sums of several predictors of the final hidden state.

    Args:
        lm: gives the unembedding.
        final_hidden: [N, D] of the frozen model; its own metrics go to `sums["frozen"]`.
        predicted: name to predicted final hidden state [N, D].
        targets: [N] next tokens.
        sums: one entry per predictor, and "frozen".
        chunk_tokens: tokens whose logits exist at one time.
    """
    for start in range(0, len(targets), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        frozen = FrozenPredictions.of(_logprobs(lm, final_hidden[rows]), targets[rows])
        sums["frozen"].add(frozen.logprobs, frozen)
        for name, hidden in predicted.items():
            sums[name].add(_logprobs(lm, hidden[rows]), frozen)


def _logprobs(lm: FrozenLM, hidden: Tensor) -> Tensor:
    # In the model's dtype, as the frozen hidden state is: the unembedding is then twice as fast.
    return torch.log_softmax(lm.unembed(hidden.to(lm.dtype)), dim=-1)

"""What a decoder has in the place of the frozen model's upper part, in one interface.

It reads what the latents add up to, as a residual stream at the hook layer, and predicts the final
hidden state. Whoever holds a decoder asks this part, and not which kind it is.

Axes: B sequence, T position, N rows of cached text, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import Cache


class UpperPart(nn.Module, ABC):
    """Residual stream at the hook layer -> predicted final hidden state."""

    looks_back: ClassVar[bool]
    """Whether latents of earlier positions move a prediction."""
    numbers: tuple[int, ...]
    """Numbers of the frozen model's blocks that it has the like of."""

    @abstractmethod
    def forward(
        self,
        resid: Float[Tensor, "*places d_model"],
        *,
        attention_mask: Shaped[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "#batch length"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "*places d_model"]:
        """Predicted final hidden states [..., D] of `resid` [..., D].

        Args:
            resid: [B, T, D] where it looks back.
            attention_mask: [B, S], 0 for padding.
            position_ids: [B, T]; None: 0 to T - 1.
            past_key_values: holds its own layers only; extended in place.
        """

    @abstractmethod
    def of_rows(
        self,
        resid: Float[Tensor, "tokens d_model"],
        seq_id: Int[Tensor, " tokens"],
        pos: Int[Tensor, " tokens"],
    ) -> Float[Tensor, "tokens d_model"]:
        """Predicted final hidden states [N, D] of N rows of whole sequences.

        Args:
            resid: [N, D].
            seq_id: [N], rows of one sequence side by side.
            pos: [N] positions, rising within a sequence.
        """

    @abstractmethod
    def direct(self, rows: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """What `rows` [n, D] of the residual stream leave of themselves: [n, D]."""


class LinearDecoder(UpperPart):
    """None at all: the latents' sum is the prediction, each position by itself."""

    looks_back = False
    numbers = ()

    def forward(
        self, resid: Float[Tensor, "*places d_model"], **_: object
    ) -> Float[Tensor, "*places d_model"]:
        """`resid` itself."""
        return resid

    def of_rows(
        self,
        resid: Float[Tensor, "tokens d_model"],
        seq_id: Int[Tensor, " tokens"],
        pos: Int[Tensor, " tokens"],
    ) -> Float[Tensor, "tokens d_model"]:
        """`resid` itself."""
        return resid

    def direct(self, rows: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """`rows` themselves, exactly."""
        return rows

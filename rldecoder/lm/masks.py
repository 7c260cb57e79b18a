"""The attention mask that reaches a block: read it, or give another.

Axes: T position that looks, S position that is looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rldecoder.errors import BadInputError

_NAME = "attention_mask"


@contextmanager
def given_mask(block: nn.Module, mask: Float[Tensor, "#batch 1 length seen"]) -> Iterator[None]:
    """While open, `block` adds `mask` to its scores, whatever mask it is called with."""
    place = _place(block)

    def change(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > place:
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, _NAME: mask}

    handle = block.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def seen_masks(blocks: nn.ModuleList) -> Iterator[list[Tensor | None]]:
    """The masks that the blocks are called with while this is open, in order."""
    seen: list[Tensor | None] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = _place(module)
        seen.append(args[place] if len(args) > place else kwargs.get(_NAME))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def allowed_by(
    mask: Tensor | None, length: int, device: torch.device
) -> Bool[Tensor, "length length"]:
    """Which positions a mask of one whole sequence lets each look at: [T, S] bool.

    Raises:
        BadInputError: the mask does more than to allow and to forbid.
    """
    if mask is None:  # attention is told to be causal, and needs none
        return torch.ones(length, length, dtype=torch.bool, device=device).tril()
    whole = isinstance(mask, Tensor) and mask.shape == (1, 1, length, length)
    if whole and mask.dtype == torch.bool:
        return mask[0, 0]
    if whole and bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        return mask[0, 0] == 0
    raise BadInputError(
        f"The model's attention mask is a {type(mask).__name__} that is no plain mask.",
        "It holds more than what a position may look at.",
        "Set `train_decoder.depth: 0`, or use another model.",
    )


def _place(block: nn.Module) -> int:
    """Which argument of a block is its mask."""
    names = list(inspect.signature(block.forward).parameters)
    if _NAME not in names:
        raise BadInputError(
            f"Blocks of type {type(block).__name__} take no attention mask.",
            "What a changed position looks at cannot be said to them.",
            "Set `train_decoder.depth: 0`, or use another model.",
        )
    return names.index(_NAME)

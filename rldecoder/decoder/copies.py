"""Whether copied blocks compute what the frozen model's blocks of the same numbers do."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rldecoder.errors import BadInputError
from rldecoder.lm.cut import find_parts, replaced_input, with_blocks

_TOKENS = 64
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_COARSE_ROUNDING = 5e-2
"""Of 16-bit weights, where one step is 0.004 to 0.008 of a number: sums in another order move the
worst token by a few steps (0.011 for the last block of SmolLM2-135M in bfloat16)."""


@torch.no_grad()
def compare_copies(
    body: PreTrainedModel,
    numbers: Sequence[int],
    base: PreTrainedModel,
    input_ids: Int[Tensor, "batch length"] | None,
) -> None:
    """Run the same input through each frozen block, where it is, and through its copy.

    Args:
        body: holds the copies, in order.
        numbers: of the frozen blocks.
        base: the frozen model.
        input_ids: [B, T]; None: `_TOKENS` tokens, none of them special.

    Raises:
        BadInputError: they differ by more than rounding, or the copy cannot be run.
    """
    kinds = getattr(body.config, "layer_types", None) or []
    for number, kind in zip(numbers, kinds, strict=False):
        if "attention" not in kind or kind == "linear_attention":
            raise _refusal(base, number, f"It is no attention over positions (`{kind}`).")
    if input_ids is None:
        table = base.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        input_ids = (1 + 7 * torch.arange(_TOKENS))[None] % table.num_embeddings
    doors, left = _through(base, numbers, input_ids.to(base.device))
    twin = copy.deepcopy(body).to(base.device, base.dtype)  # type: ignore[arg-type]
    blocks_name, _ = find_parts(twin)
    for index, number in enumerate(numbers):
        try:
            alone = with_blocks(twin, [index], norm=False)
            block = twin.get_submodule(f"{blocks_name}.{index}")
            with replaced_input(block, partial(_instead, doors[number])):
                mine = alone(inputs_embeds=doors[number], use_cache=False).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        # What a block that needs more than the residual stream says of it, in its own words.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _refusal(base, number, f"The copy cannot be run: {error}") from error
        size = left[number].float().norm(dim=-1)  # a padding token's may be 0
        off = (mine - left[number]).float().norm(dim=-1) / size.clamp_min(1e-3 * size.mean())
        worst = float(off.max())
        if not worst <= _ROUNDING.get(base.dtype, _COARSE_ROUNDING):
            raise _refusal(base, number, f"They differ by up to {worst:.2g} of a residual.")


def _through(
    base: PreTrainedModel, numbers: Sequence[int], input_ids: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What stands at the doors of the frozen blocks, and what leaves them: [B, T, D] each."""
    doors: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}

    def keep(number: int, hidden: Tensor) -> Tensor:
        doors[number] = hidden
        return hidden

    def keep_left(number: int, _block: nn.Module, _inputs: Any, out: Any) -> None:
        left[number] = out[0] if isinstance(out, tuple) else out

    blocks_name, _ = find_parts(base)
    with ExitStack() as hooks:
        for number in numbers:
            block = base.get_submodule(f"{blocks_name}.{number}")
            hooks.enter_context(replaced_input(block, partial(keep, number)))
            handle = block.register_forward_hook(partial(keep_left, number))
            hooks.callback(handle.remove)
        base(input_ids=input_ids, use_cache=False)
    return doors, left


def _instead(new: Tensor, _old: Tensor) -> Tensor:
    return new


def _refusal(base: PreTrainedModel, number: int, why: str) -> BadInputError:
    return BadInputError(
        f"The decoder's copy of block {number} is not that block of the "
        f"{base.config.model_type!r} model.",
        why,
        "Set `train_decoder.depth: 0` and `frontier.depths: [0]`, or use another model.",
    )

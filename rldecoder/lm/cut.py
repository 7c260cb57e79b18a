"""Cutting a transformers model between its blocks: where they are, fewer of them, their doors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from rldecoder.errors import BadInputError

# The module after the last block, by architecture: Llama, Gemma, Mistral, Qwen | GPT-2 |
# GPT-NeoX (Pythia) | Phi.
_FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def find_parts(base: PreTrainedModel) -> tuple[str, str]:
    """Names of the block list and of the final norm inside a base model.

    Raises:
        BadInputError: there is not exactly one of each.
    """
    depth = getattr(base.config, "num_hidden_layers", None)
    if depth is None or not isinstance(base, PreTrainedModel):
        raise BadInputError(
            f"Models of type {base.config.model_type!r} are not supported.",
            "Their config names no number of blocks: they are made of several parts "
            "(`text_config`), or not of blocks.",
            "Take a text-only causal language model (of Gemma 3: 270M or 1B).",
        )
    blocks = [
        name
        for name, module in base.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    norms = [name for name in _FINAL_NORM_NAMES if isinstance(getattr(base, name, None), nn.Module)]
    if len(blocks) != 1 or len(norms) != 1:
        raise BadInputError(
            f"Models of type {base.config.model_type!r} are not supported.",
            f"Found block lists {blocks} and final norms {norms}; exactly one of each is needed.",
            "Use a GPT-2, Llama, GPT-NeoX, Gemma, Phi or similar model.",
        )
    return blocks[0], norms[0]


def with_blocks(
    base: PreTrainedModel, numbers: Sequence[int], *, norm: bool = True
) -> PreTrainedModel:
    """The base model with only these of its blocks, sharing all parameters.

    Args:
        base: left as it is.
        numbers: of the blocks, in order.
        norm: whether the final norm stays.
    """
    blocks_name, norm_name = find_parts(base)
    blocks = base.get_submodule(blocks_name)
    cut = copy.copy(base)
    cut._modules = dict(base._modules)
    cut._modules[blocks_name] = nn.ModuleList(blocks.get_submodule(str(n)) for n in numbers)
    if not norm:
        cut._modules[norm_name] = nn.Identity()
    cut.config = config_with_blocks(base.config, numbers)
    return cut


def config_with_blocks(config: PreTrainedConfig, numbers: Sequence[int]) -> Any:
    """A copy of a model's configuration with only these blocks."""
    fewer: Any = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    fewer.num_hidden_layers = len(numbers)
    if layer_types is not None:
        fewer.layer_types = [layer_types[number] for number in numbers]
    return fewer


class CutCache(DynamicCache):
    """The KV cache of a cut that begins at block `first`; its layers count from 0.

    Attention names its block by the number that it has in the whole model, and masks are made
    for the length of layer 0: both would go wrong in a cache with a gap at its beginning.
    """

    def __init__(self, config: PreTrainedConfig, first: int) -> None:
        super().__init__(config=config)
        self.first = first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of the block that has this number in the whole model."""
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)


@contextmanager
def replaced_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `module` receives `change(hidden_states)` instead of its hidden states."""
    handle = module.register_forward_pre_hook(
        lambda _module, args, kwargs: _on_input(args, kwargs, change), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def _on_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with `change` applied to the hidden states, which may come by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

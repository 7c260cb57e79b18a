"""Cutting a transformers model between its blocks: where they are, fewer of them, their doors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and next(module.parameters(), None) is not None  # a list of rotary tables has none
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
    """A copy of a model's configuration with only these blocks.

    Raises:
        BadInputError: it derives the kinds of its blocks from their numbers.
    """
    fewer: Any = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    try:
        fewer.num_hidden_layers = len(numbers)
        if layer_types is not None:
            fewer.layer_types = [layer_types[number] for number in numbers]
    except AttributeError as error:
        raise BadInputError(
            f"Models of type {config.model_type!r} cannot be cut between their blocks.",
            f"The kinds of the blocks follow from their numbers: {error}.",
            "Use a GPT-2, Llama, GPT-NeoX, Gemma, Phi or similar model.",
        ) from error
    return fewer


class WholeCache(DynamicCache):
    """A KV cache that drops no position: what a block may look at is the mask's business.

    transformers shortens the cache wherever the configuration names a window, also of models
    whose attention has none.

    Raises:
        BadInputError: a block keeps something else than keys and values.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        odd = {type(layer) for layer in self.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        if odd:
            raise BadInputError(
                f"Models of type {config.model_type!r} cannot go on from where they stopped.",
                f"Some of their blocks keep more than keys and values "
                f"({', '.join(sorted(kind.__name__ for kind in odd))}).",
                "Use a model whose blocks are all attention.",
            )
        self.layers = [DynamicLayer() for _ in self.layers]


class CutCache(WholeCache):
    """The KV cache of a cut that begins at block `first`; its layers count from 0.

    Attention names its block by the number that it has in the whole model, and masks are made
    for the length of layer 0: both would go wrong in a cache with a gap at its beginning.
    """

    def __init__(self, config: PreTrainedConfig, first: int) -> None:
        super().__init__(config)
        self.first = first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of the block that has this number in the whole model."""
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)


class NumberedCache(DynamicCache):
    """A view of a KV cache for blocks that have these numbers; its layers count from 0.

    What is added through the view is in the cache.
    """

    def __init__(self, cache: Cache, numbers: Sequence[int]) -> None:
        self.__dict__.update(vars(cache))
        self._place = {number: place for place, number in enumerate(numbers)}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of the block that has this number in the whole model."""
        return super().update(key_states, value_states, self._place[layer_idx], *args, **kwargs)


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

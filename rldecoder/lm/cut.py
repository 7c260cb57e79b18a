"""Cutting a transformers model between its blocks: where they are, fewer of them, their doors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from rldecoder.errors import BadInputError


def with_block_list(base: PreTrainedModel) -> PreTrainedModel:
    """The model that has the blocks: the base model, or the one that is wrapped in it (OPT).

    Llama 4 has no base model of the name that it gives, so that the whole stands in its place.
    """
    while not any(isinstance(child, nn.ModuleList) for child in base.children()):
        inner = [child for child in base.children() if isinstance(child, PreTrainedModel)]
        if len(inner) != 1:
            break
        base = inner[0]
    return base


def number_of_blocks(config: PreTrainedConfig) -> int:
    """How many blocks a configuration says that its model has.

    Raises:
        BadInputError: it names no number.
    """
    depth: int | None = getattr(config, "num_hidden_layers", None)
    if depth is None:
        raise BadInputError(
            f"Models of type {config.model_type!r} are not supported.",
            "Their config names no number of blocks: they are made of several parts, or not of "
            "blocks.",
            "docs/models.md lists the types that work: use a model of one of these.",
        )
    return depth


def find_parts(base: PreTrainedModel) -> tuple[str, str]:
    """Names of the block list and of the final norm inside a base model.

    Raises:
        BadInputError: there is not exactly one of each.
    """
    depth = number_of_blocks(base.config)
    blocks = [
        name
        for name, module in base.named_children()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and next(module.parameters(), None) is not None  # a list of rotary tables has none
    ]
    # Modules mostly stand in the order in which they are used: embeddings and their norm, blocks,
    # the final norm (nothing, in a cut). A wrong guess is found by `proof.prove`.
    names = [name for name, _ in base.named_children()]
    norms = [name for name in names if _is_norm(name, base.get_submodule(name))]
    after = set(names[names.index(blocks[0]) :]) if blocks else set()
    norms = [name for name in norms if name in after] or norms
    norms = ["norm"] if "norm" in norms else norms
    if len(blocks) != 1 or len(norms) != 1:
        raise BadInputError(
            f"Models of type {base.config.model_type!r} are not supported.",
            f"Found block lists {blocks} and final norms {norms}; exactly one of each is needed.",
            "docs/models.md lists the types that work: use a model of one of these.",
        )
    return blocks[0], norms[0]


def _is_norm(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Identity):
        return name == "ln_f" or "norm" in name
    return "norm" in type(module).__name__.lower()


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
    vars(cut).pop("forward", None)  # accelerate's, of a model on several devices: the whole's
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
            "docs/models.md lists the types that work: use a model of one of these.",
        ) from error
    return fewer


class WholeCache(DynamicCache):
    """A KV cache that drops no position: what a block may look at is the mask's business.

    transformers shortens the cache wherever the configuration names a window, also of models
    whose attention has none. Blocks of linear attention keep a state instead of positions.

    Raises:
        BadInputError: a block keeps something else, or no block keeps positions.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        odd = {type(layer) for layer in self.layers} - _KEPT.keys()
        if odd:
            raise BadInputError(
                f"Models of type {config.model_type!r} cannot go on from where they stopped.",
                f"Some of their blocks keep more than keys, values and states "
                f"({', '.join(sorted(kind.__name__ for kind in odd))}).",
                "Use a model whose blocks are attention, or linear attention.",
            )
        kept = [_KEPT[type(layer)] for layer in self.layers]
        # Positions are counted by the keys of the first block that has some.
        if kept and not any(issubclass(kind, DynamicLayer) for kind in kept if kind):
            raise BadInputError(
                f"These {len(kept)} blocks of a {config.model_type!r} model cannot go on from "
                "where they stopped.",
                "They are linear attention all: none keeps positions.",
                "Choose a `hook_layer` with a block of full attention before it and after it.",
            )
        self.layers = [
            layer if kind is None else kind() for layer, kind in zip(self.layers, kept, strict=True)
        ]


_KEPT: dict[type, type[DynamicLayer] | None] = {
    DynamicLayer: DynamicLayer,
    DynamicSlidingWindowLayer: DynamicLayer,
    DynamicIndexedLayer: DynamicIndexedLayer,
    LinearAttentionLayer: None,
    LinearAttentionAndFullAttentionLayer: None,
    DummyLayer: None,
}
"""What a block keeps, and what keeps all of it; None: as it is."""


def keeps_states(config: PreTrainedConfig) -> bool:
    """Whether some blocks keep a state that every position runs through, padding too.

    Padding before a text leaves it at zero; padding within one, after a shared beginning, does not.
    """
    return any(
        isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in DynamicCache(config=config).layers
    )


def fit_cache(cache: Cache, config: PreTrainedConfig) -> None:
    """Give a cache that holds nothing yet the layers that these blocks need.

    `generate`, and whoever makes a cache without knowing the blocks, gives each keys and values.
    """
    if not cache.get_seq_length():
        fresh = WholeCache(config).layers
        cache.layers[: len(fresh)] = fresh


def choose_rows(cache: Cache, rows: Tensor) -> None:
    """Make a cache's rows these of them [n], any number and any of them twice.

    (`batch_repeat_interleave` knows keys and values only.)
    """
    # Typed for a LongTensor, which nothing in torch is said to return.
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def repeat_rows(cache: Cache, times: int) -> None:
    """Make `times` rows of a cache of one."""
    choose_rows(cache, torch.zeros(times, dtype=torch.long))


class _NumberedCache(DynamicCache):
    """Its blocks name themselves by the number that they have in the whole model.

    Its layers count from 0, as masks do: attention and masks would go wrong in a cache with a gap
    at its beginning.
    """

    def place(self, number: int) -> int:
        """The layer of the block that has this number in the whole model; subclasses know it."""
        raise NotImplementedError

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return super().update(key_states, value_states, self.place(layer_idx), *args, **kwargs)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        return super().update_indexer(indexer_key_states, self.place(layer_idx))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return super().get_conv_state(self.place(layer_idx), state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return super().update_conv_state(conv_states, self.place(layer_idx), state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return super().get_recurrent_state(self.place(layer_idx), state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return super().update_recurrent_state(
            recurrent_states, self.place(layer_idx), state_idx, **kwargs
        )

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        place = None if layer_idx is None else self.place(layer_idx)
        return super().has_previous_state(place, state_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        return super().is_recording_past(self.place(layer_idx))


class CutCache(_NumberedCache, WholeCache):
    """The KV cache of a cut that begins at block `first`."""

    def __init__(self, config: PreTrainedConfig, first: int) -> None:
        super().__init__(config)
        self.first = first

    def place(self, number: int) -> int:
        return number - self.first


class NumberedCache(_NumberedCache):
    """A view of a KV cache for blocks that have these numbers.

    What is added through the view is in the cache.
    """

    def __init__(self, cache: Cache, numbers: Sequence[int]) -> None:
        self.__dict__.update(vars(cache))
        self._place = {number: place for place, number in enumerate(numbers)}

    def place(self, number: int) -> int:
        return self._place[number]


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

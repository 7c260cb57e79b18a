"""The blocks of a transformer decoder: a few of the frozen model's own kind, trainable.

Between two kept blocks the frozen model had others. An affine map stands for them: each block
reads `resid @ A + c`, so that it sees nearly what it saw in the frozen model (compare model
stitching, arXiv 2106.07682, and tuned lenses, arXiv 2303.08112). The attention sink at position 0
has a residual many times longer than all others and says nothing about the text: every block
reads one learned vector there, and no latent.

Axes: B sequence, T position, D model width, S cached and new positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rldecoder.decoder.configuration_sae_decoder import SaeDecoderConfig
from rldecoder.decoder.copies import compare_copies
from rldecoder.decoder.upper import UpperPart
from rldecoder.lm.cut import (
    NumberedCache,
    config_with_blocks,
    find_parts,
    replaced_input,
    with_block_list,
    with_blocks,
)
from rldecoder.lm.masks import given_mask
from rldecoder.lm.placement import require_whole_weights


class _NoEmbedding(nn.Module):
    """In the place of an embedding table: no table, no sum, no position."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, self.d_model, device=ids.device)


class BlockDecoder(UpperPart):
    """A few blocks over the positions, joined by affine maps."""

    looks_back = True

    def __init__(self, config: SaeDecoderConfig) -> None:
        super().__init__()
        assert config.blocks is not None
        self.numbers = tuple(config.blocks)
        self.body = _body(config)
        self._blocks_name, self._norm_name = find_parts(self.body)
        d = config.d_model
        self.bridges = nn.ModuleList(nn.Linear(d, d) for _ in self.numbers[1:])
        self.out = nn.Linear(d, d)
        self.sinks = nn.Parameter(torch.zeros(len(self.numbers), d))
        self.proven_masks: tuple[Tensor, ...] = ()
        """Kept by `reader.proven_masks`."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        blocks = self.body.get_submodule(self._blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.body.get_submodule(self._norm_name)

    def maps(self) -> list[nn.Linear]:
        """Every affine map: the bridges, then the one after the norm."""
        return [module for module in (*self.bridges, self.out) if isinstance(module, nn.Linear)]

    def forward(
        self,
        resid: Float[Tensor, "batch length d_model"],
        *,
        attention_mask: Shaped[Tensor, "#batch *seen"] | None = None,
        position_ids: Int[Tensor, "#batch length"] | None = None,
        past_key_values: Cache | None = None,
        masks: Sequence[Float[Tensor, "#batch 1 length seen"]] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """Predicted final hidden states [B, T, D].

        Args:
            resid: [B, T, D] at the door of the first block.
            attention_mask: [B, S], 0 for padding.
            position_ids: [B, T]; None: 0 to T - 1.
            past_key_values: holds these blocks' layers only; extended in place.
            masks: what each block adds to its scores, [B, 1, T, S] each; None: as the model has
                it, from `attention_mask`.
        """
        if position_ids is None:
            position_ids = torch.arange(resid.shape[1], device=resid.device)[None]
        first = (position_ids == 0)[..., None]
        cache = None if past_key_values is None else NumberedCache(past_key_values, self.numbers)
        with ExitStack() as hooks:
            for index, block in enumerate(self.blocks):
                door = partial(self.enter, index, first=first)
                if index == 0:
                    # The body's embedding part may scale or move what it is given.
                    door = partial(_instead, door, resid)
                hooks.enter_context(replaced_input(block, door))
                if masks is not None:
                    hooks.enter_context(given_mask(block, masks[index]))
            if masks is not None:
                attention_mask = masks[0]  # the body makes none of its own
            out = self.body(
                inputs_embeds=resid.detach(),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        predicted: Tensor = self.out(out.last_hidden_state)
        return predicted

    def of_rows(
        self,
        resid: Float[Tensor, "tokens d_model"],
        seq_id: Int[Tensor, " tokens"],
        pos: Int[Tensor, " tokens"],
    ) -> Float[Tensor, "tokens d_model"]:
        """Predicted final hidden states [N, D]; places without a row are not seen.

        Position 0 is never cached, and stays visible: every block reads its learned sink there.
        """
        _, row = torch.unique_consecutive(seq_id.to(resid.device), return_inverse=True)
        column = pos.to(resid.device).long()
        shape = (int(row[-1]) + 1, int(column.max()) + 1)
        grid = resid.new_zeros(*shape, resid.shape[-1]).index_put((row, column), resid)
        mask = torch.zeros(shape, dtype=torch.long, device=resid.device)
        mask[row, column] = 1
        mask[:, 0] = 1
        positions = torch.arange(shape[1], device=resid.device).expand(shape)
        hidden: Tensor = self(grid, attention_mask=mask, position_ids=positions)
        return hidden[row, column]

    def enter(
        self,
        index: int,
        hidden: Float[Tensor, "batch length d_model"],
        *,
        first: Bool[Tensor, "#batch length 1"],
    ) -> Float[Tensor, "batch length d_model"]:
        """What block `index` reads of `hidden` [B, T, D]; `first` [B, T, 1]: position 0."""
        if index:
            hidden = self.bridges[index - 1](hidden)
        return torch.where(first, self.sinks[index], hidden)

    def run_block(
        self, index: int, hidden: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        """What leaves block `index` (no norm after it) when `hidden` [B, T, D] stands at its door.

        For sequences from position 0 on, without padding.
        """
        first = (torch.arange(hidden.shape[1], device=hidden.device) == 0)[None, :, None]
        alone = with_blocks(self.body, [index], norm=False)
        with replaced_input(
            self.blocks[index], lambda _: torch.where(first, self.sinks[index], hidden)
        ):
            left: Tensor = alone(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return left

    def direct(self, rows: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """What `rows` [n, D] at the first door would leave of themselves, past all blocks: [n, D].

        The bridges, the final norm and the last map, without their constants, as if a row were the
        whole residual stream: the norm makes all rows alike in length.
        """
        for bridge in self.maps()[:-1]:
            rows = F.linear(rows, bridge.weight)
        normed: Tensor = self.norm(rows) - self.norm(torch.zeros_like(rows))
        return F.linear(normed, self.out.weight)

    @torch.no_grad()
    def copy_from(
        self, base: PreTrainedModel, input_ids: Int[Tensor, "batch length"] | None = None
    ) -> None:
        """Take the weights of the frozen model's blocks of the same numbers, and its norm.

        Args:
            base: the frozen model without its head.
            input_ids: [B, T], what the copies are compared on; None: a few tokens of any kind.

        Raises:
            BadInputError: a copy does not compute what the frozen block does.
        """
        require_whole_weights(base, "A decoder with blocks copies them and trains the copies")
        blocks_name, norm_name = find_parts(base)
        theirs = base.get_submodule(blocks_name)
        for number, block in zip(self.numbers, self.blocks, strict=True):
            block.load_state_dict(theirs.get_submodule(str(number)).state_dict())
        self.norm.load_state_dict(base.get_submodule(norm_name).state_dict())
        compare_copies(self.body, self.numbers, base, input_ids)


def plain_attention() -> AbstractContextManager[None]:
    """While open, attention is plain products and a softmax, with the scores kept.

    The CPU's flash kernel multiplies in float32; with bfloat16 factors (`matmul_precision`) plain
    products take 0.6 of its time, forward and backward (measured at 256 positions).
    """
    kernels: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernels


def evenly_spaced(hook_layer: int, num_layers: int, depth: int) -> list[int]:
    """Numbers of `depth` of the blocks hook_layer to num_layers - 1, the last one among them.

    >>> evenly_spaced(15, 30, 3)
    [19, 24, 29]
    """
    span = num_layers - hook_layer
    return [hook_layer + round((i + 1) * span / depth) - 1 for i in range(depth)]


def own_layers(cache: Cache, hook_layer: int, depth: int) -> Cache:
    """A view of a KV cache that begins with the decoder's first block.

    The blocks count from 0 and build their causal mask from the first layer that they see, which
    is their own: the trunk's has already moved on.
    """
    while len(cache.layers) < hook_layer + depth:  # a cache made without a config grows by need
        cache.layers.append(DynamicLayer())
    view = copy.copy(cache)
    view.layers = cache.layers[hook_layer:]
    return view


def _body(config: SaeDecoderConfig) -> PreTrainedModel:
    """The frozen model's kind of model with only the kept blocks, and no vocabulary.

    A block may follow its number: which attention it has, whether it turns positions, how it
    scales scores, how wide it is. So the whole model is made, without memory, and blocks are
    taken from it under the numbers that they have in the frozen model.
    """
    assert config.block_config is not None
    assert config.blocks is not None
    whole = AutoConfig.for_model(**copy.deepcopy(config.block_config))
    whole.vocab_size = 1
    whole.pad_token_id = whole.bos_token_id = whole.eos_token_id = 0  # within the vocabulary
    # The configuration names the dtype of the frozen weights; these are to be trained.
    fewer = config_with_blocks(whole, config.blocks)
    body = with_block_list(AutoModel.from_config(fewer, dtype=torch.float32))
    with torch.device("meta"):
        source = with_block_list(AutoModel.from_config(whole, dtype=torch.float32))
    blocks_name, _ = find_parts(source)
    numbered = nn.ModuleList(source.get_submodule(f"{blocks_name}.{n}") for n in config.blocks)
    device = torch.empty(0).device
    if device.type != "meta":  # `from_pretrained` fills them in itself
        numbered.to_empty(device=device)
        _start_like(body, numbered, body.get_submodule(blocks_name))
    body.set_submodule(blocks_name, numbered)
    for name, child in list(body.named_children()):
        if isinstance(child, nn.Embedding):
            setattr(body, name, _NoEmbedding(config.d_model))
    return body


@torch.no_grad()
def _start_like(body: PreTrainedModel, blocks: nn.Module, unnumbered: nn.Module) -> None:
    """Give `blocks` the values that transformers gave the unnumbered ones, where they fit."""
    with torch.random.fork_rng(devices=[]):
        blocks.apply(body._init_weights)  # buffers too, which no state_dict holds
    values = unnumbered.state_dict()
    for name, tensor in blocks.state_dict().items():
        if name in values and values[name].shape == tensor.shape:
            tensor.copy_(values[name])


def _instead(door: Callable[[Tensor], Tensor], resid: Tensor, _: Tensor) -> Tensor:
    return door(resid)

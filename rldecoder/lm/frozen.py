"""A frozen language model, cut at any layer: trunk, tail, splice, unembedding.

Words: the residual stream at layer L is what flows after L blocks (0 = embeddings). The final
hidden state is the output of the model's last norm; the unembedding turns it into logits.
Axes: B sequence, T position, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rldecoder.config.model import Loading
from rldecoder.errors import BadInputError
from rldecoder.lm.cut import (
    CutCache,
    WholeCache,
    find_parts,
    fit_cache,
    replaced_input,
    with_block_list,
    with_blocks,
)
from rldecoder.lm.loading import read_model
from rldecoder.lm.placement import is_offloaded, loading_arguments, require_placed
from rldecoder.lm.proof import prove
from rldecoder.lm.specs import ModelRecord, stated_context_length
from rldecoder.lm.text_tokens import encode_prompt, end_token_ids, set_bos, tokens_in_front
from rldecoder.lm.unembedding import Unembedding
from rldecoder.precision import fast_dtype

# Longer than any context: what tokenizers say that know no bound.
_NO_BOUND = 10**7


class TrunkOutput(NamedTuple):
    """The residual stream at a layer, and the cache that lets the next call go on from there."""

    resid: Tensor
    """[B, T, D]"""
    past_key_values: Cache | None


class FrozenLM:
    """A causal language model that is only read: eval mode, no parameter takes a gradient.

    Gradients do flow through `tail`, `splice` and `unembed` to tensors given to them, which is
    what attribution and training through the frozen model need.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.folder = folder
        base = model.base_model
        assert isinstance(base, PreTrainedModel)
        self._base = with_block_list(base)
        self._blocks_name, self._norm_name = find_parts(self._base)
        self._unembedding = Unembedding(model)
        self._offloaded = is_offloaded(model)
        self._cuts: dict[tuple[str, int], PreTrainedModel] = {}
        self._mean_direction: Tensor | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        record: Path | None = None,
        loading: Loading | None = None,
    ) -> FrozenLM:
        """Load a Hugging Face folder (safetensors only, no code from the folder is run).

        Args:
            folder: holds config.json, model.safetensors and the tokenizer's files.
            device: where the weights go.
            dtype: of weights and residuals; None takes the record's `compute_dtype`, else the
                dtype of the stored weights. A CPU that is faster with float32 then runs bfloat16
                weights in it.
            record: a published model's `ModelRecord`; None, or no such file, for any other folder.
            loading: how the weights are kept; None takes the record's, else whole on the device.

        The parts are compared with the model's own forward pass (`proof.prove`); what was
        published with a record was compared in full before, and is here in short.

        Raises:
            BadInputError: the folder is not a model that can be read, or its parts are not the
                model.
            NoResourceError: it is too large for where it was to go.
            NumericalError: a weight is NaN or infinite.
            DamagedFileError: the record cannot be read.
        """
        folder = Path(folder)
        known = ModelRecord.load(record) if record is not None and record.is_file() else None
        if dtype is None and known is not None:
            dtype = fast_dtype(known.compute_dtype, device)
        if loading is None:
            loading = Loading() if known is None else known.loading
        arguments = loading_arguments(loading, torch.device(device), dtype)
        model, tokenizer = read_model(folder, dtype, arguments)
        require_placed(model, loading, folder)
        set_bos(tokenizer, "auto" if known is None else known.bos)
        if "device_map" not in arguments:
            nn.Module.to(model, device)
        lm = cls(model, tokenizer, folder)
        prove(lm, brief=known is not None)
        return lm

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._unembedding.stored.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of all residuals."""
        return self._unembedding.stored.dtype

    @property
    def num_layers(self) -> int:
        """The number of blocks; layers run from 0 (embeddings) to this number."""
        return len(self._blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self._unembedding.stored.shape[1])

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding (a padded vocabulary counts in full)."""
        return int(self._unembedding.stored.shape[0])

    @property
    def context_length(self) -> int:
        """The longest sequence that the model reads, in tokens.

        Raises:
            BadInputError: neither the model nor its tokenizer says.
        """
        stated = stated_context_length(self.model.config)
        longest = self.tokenizer.model_max_length if stated is None else stated
        if longest > _NO_BOUND:
            raise BadInputError(
                f"The model in {self.folder} does not say how long a text it reads.",
                f"Its config (type {self.model.config.model_type!r}) and its tokenizer name no "
                "longest sequence.",
                "Add `max_position_embeddings` to config.json.",
            )
        return int(longest)

    @property
    def end_token_ids(self) -> list[int]:
        """All tokens that end an answer, sorted: the model's settings may name several."""
        return end_token_ids(self.tokenizer, self.model.generation_config)

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text to be continued; see `text_tokens.encode_prompt`."""
        return encode_prompt(self.tokenizer, text)

    @cached_property
    def front(self) -> tuple[int, ...]:
        """What stands before every text: nothing, or its beginning-of-text token."""
        return tuple(tokens_in_front(self.tokenizer))

    @property
    def eos_token_id(self) -> int:
        """The tokenizer's end-of-text token."""
        if self.tokenizer.eos_token_id is None:
            raise BadInputError(
                f"The tokenizer in {self.folder} has no end-of-text token.",
                "Documents are separated by it.",
                "Set `eos_token` in tokenizer_config.json.",
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_token_id(self) -> int:
        """The padding token; the end-of-text token where none is defined (GPT-2)."""
        pad = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else int(pad)

    @property
    def unembedding(self) -> Tensor:
        """What a final hidden state is multiplied with for its logits: [V, D], model's dtype. The
        output layer's weights, times the scale that some models give their logits."""
        return self._unembedding.directions

    def choice_directions(self, token_ids: Tensor) -> Tensor:
        """What raises these tokens' logits above the mean logit: [..., D] float32 for ids [...].

        Rows of the unembedding less their mean over the vocabulary. A step that moves all logits
        alike changes no probability, and has no part in these directions; it has in the rows.
        """
        mean = self._mean_direction
        if mean is None or mean.device != self.device:
            mean = self._mean_direction = self.unembedding.mean(0, dtype=torch.float32)
        return self.unembedding[token_ids].float() - mean

    @property
    def base(self) -> PreTrainedModel:
        """The model without its output layer."""
        return self._base

    @property
    def _blocks(self) -> nn.ModuleList:
        blocks = self._base.get_submodule(self._blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def trunk(
        self,
        input_ids: Tensor,
        layer: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> TrunkOutput:
        """The residual stream [B, T, D] after `layer` blocks; later blocks are not run.

        Args:
            input_ids: [B, T]; with `past_key_values`, only the tokens that it has not seen.
            layer: 0 to `num_layers`.
            attention_mask: [B, S], 1 = real token, S counts cached positions too.
            position_ids: [B, T]; None counts the real tokens of the mask, which left padding
                needs (GPT-2 would otherwise number the padding).
            past_key_values: what an earlier call returned.
            use_cache: return a cache for the next call.
        """
        self._check_layer(layer)
        if use_cache and layer == 0:
            raise BadInputError(
                "Layer 0 has no cache: its residuals are the embeddings.",
                "A cache counts the positions that a block has seen.",
                "Use a layer of 1 or more, or `use_cache=False`.",
            )
        cut = self._cut("trunk", layer)
        if use_cache:
            past_key_values = DynamicCache() if past_key_values is None else past_key_values
            fit_cache(past_key_values, cut.config)
        with torch.no_grad():
            out = cut(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=count_positions(attention_mask, position_ids, input_ids.shape[1]),
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
        return TrunkOutput(out.last_hidden_state, out.past_key_values if use_cache else None)

    def tail(
        self,
        resid: Tensor,
        layer: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """The final hidden state [B, T, D] from the residual stream [B, T, D] at `layer`.

        Differentiable with respect to `resid`, which is cast to the model's dtype, where all
        blocks are in memory.

        Args:
            resid: [B, T, D]; with `past_key_values`, only at positions that it has not seen.
            layer: 0 to `num_layers`.
            attention_mask: [B, S], 1 = real token, S counts cached positions too.
            position_ids: [B, T]; None counts the real tokens of the mask.
            past_key_values: made by `tail_cache` for this layer; extended in place.
        """
        self._check_layer(layer)
        self._check_gradient(resid)
        resid = resid.to(self.dtype)
        cut = self._cut("tail", layer)
        first = self.part_after(layer)
        # The embedding part of `forward` (position embeddings, scales) would change the residual:
        # it is given a detached copy, and its result is replaced at the first block's door.
        with replaced_input(first, lambda _: resid):
            out = cut(
                inputs_embeds=resid.detach(),
                attention_mask=attention_mask,
                position_ids=count_positions(attention_mask, position_ids, resid.shape[1]),
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
            )
        return out.last_hidden_state

    def has_caches(self, layer: int) -> bool:
        """Whether the blocks on both sides of `layer` can go on from where they stopped."""
        try:
            for side in ("trunk", "tail"):
                WholeCache(self._cut(side, layer).config)
        except BadInputError:
            return False
        return True

    def tail_cache(self, layer: int) -> Cache:
        """An empty KV cache for `tail` at `layer`."""
        self._check_layer(layer)
        return CutCache(self._cut("tail", layer).config, layer)

    @torch.no_grad()
    def resid_and_final(
        self,
        input_ids: Tensor,
        layer: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Residual stream at `layer` and final hidden state, both [B, T, D], in one pass."""
        self._check_layer(layer)
        seen: list[Tensor] = []
        with replaced_input(self.part_after(layer), partial(_keep, seen)):
            final = self._run(input_ids, attention_mask, position_ids)
        return seen[0], final

    @torch.no_grad()
    def residuals(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """All `num_layers + 1` residual streams (0 = embeddings) and the final hidden state.

        Unlike `output_hidden_states`, the last residual is the one before the final norm.
        """
        seen: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in range(self.num_layers + 1):
                hooks.enter_context(replaced_input(self.part_after(layer), partial(_keep, seen)))
            final = self._run(input_ids, attention_mask, None)
        return seen, final

    def splice(
        self,
        input_ids: Tensor,
        layer: int,
        replace: Callable[[Tensor], Tensor],
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The final hidden state [B, T, D] when the residual at `layer` becomes `replace(resid)`.

        Differentiable with respect to whatever `replace` uses; its result is cast to the model's
        dtype.
        """
        self._check_layer(layer)

        def put(resid: Tensor) -> Tensor:
            changed = replace(resid).to(resid.dtype)
            self._check_gradient(changed)
            return changed

        with replaced_input(self.part_after(layer), put):
            return self._run(input_ids, attention_mask, position_ids)

    def unembed(
        self, final_hidden: Tensor, *, out: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Float32 logits [..., V] of final hidden states [..., D].

        Always summed in float32: bfloat16 logits near 16 lie 0.06 to 0.12 apart, so that the
        best two of a position often tie.

        Args:
            out: [N, V] float32, overwritten and returned, for [N, D]; no gradient flows then.
            tokens: [T] ids, for logits [..., T] of these alone; not with `out`.
        """
        return self._unembedding.logits(final_hidden, out=out, tokens=tokens)

    def unembed_gradient(self, logits: Tensor, grad: Tensor) -> Tensor:
        """What `unembed` sends back: d loss / d final hidden state [N, D].

        Args:
            logits: [N, V] that `unembed` gave.
            grad: [N, V], d loss / d logits; overwritten where the model caps its logits.
        """
        return self._unembedding.gradient(logits, grad)

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        return self._base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=count_positions(attention_mask, position_ids, input_ids.shape[1]),
            use_cache=False,
        ).last_hidden_state

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer <= self.num_layers:
            raise BadInputError(
                f"Hook layer {layer} is out of range.",
                f"The model in {self.folder} has {self.num_layers} blocks.",
                f"Choose a layer from 0 (embeddings) to {self.num_layers}.",
            )

    def _check_gradient(self, resid: Tensor) -> None:
        if self._offloaded and torch.is_grad_enabled() and resid.requires_grad:
            raise BadInputError(
                "This stage sends gradients through the frozen model's blocks.",
                "Some are offloaded (`sync_tokenizer.device_map: auto`): gone once they have run.",
                "Use a device that holds the model, `quantization: 4bit`, or a smaller model.",
            )

    def part_after(self, layer: int) -> nn.Module:
        """The module whose input is the residual stream at `layer`: a block, or the final norm."""
        if layer == self.num_layers:
            return self._base.get_submodule(self._norm_name)
        return self._blocks[layer]

    def _cut(self, side: str, layer: int) -> PreTrainedModel:
        """The base model with only the blocks on one side of `layer`, sharing all parameters."""
        key = (side, layer)
        if key not in self._cuts:
            numbers = range(layer) if side == "trunk" else range(layer, self.num_layers)
            self._cuts[key] = with_blocks(self._base, numbers, norm=side == "tail")
        return self._cuts[key]


def count_positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, num_tokens: int
) -> Tensor | None:
    """Positions [B, T] counted over the real tokens of the mask [B, S], unless they are given."""
    if position_ids is not None or attention_mask is None:
        return position_ids
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]


def _keep(seen: list[Tensor], resid: Tensor) -> Tensor:
    seen.append(resid)
    return resid

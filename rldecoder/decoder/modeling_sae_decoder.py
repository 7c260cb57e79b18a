"""`SaeDecoderForCausalLM`: a causal LM that may look at nothing but SAE latents.

The frozen model runs up to the hook layer, the SAE encodes the residual stream there, and the
decoder turns the latents into the frozen model's final hidden state; the frozen unembedding
makes logits of it. Neither the SAE's error term nor the residual reaches the decoder.

Axes: B sequence, T position, K active latents, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from rldecoder.decoder.blocks import BlockDecoder, own_layers
from rldecoder.decoder.configuration_sae_decoder import SaeDecoderConfig, without_folder
from rldecoder.decoder.upper import LinearDecoder, UpperPart
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM, count_positions
from rldecoder.sae.model import Sae
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse


class FeaturesOutput(NamedTuple):
    """What the frozen part of the decoder gives."""

    latents: SparseLatents
    """Active latents, acts and indices [B, T, K]."""
    past_key_values: Cache | None
    """The trunk's cache (L layers), when one was asked for."""
    resid: Tensor
    """[B, T, D] that was encoded, for those who go on with the frozen model from there."""


@dataclass(frozen=True, eq=False)
class FrozenParts:
    """The frozen model and SAE of a decoder. Copies of the decoder share them."""

    lm: FrozenLM
    sae: Sae

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenParts:
        return self


class SaeDecoderModel(PreTrainedModel):
    """SAE latents -> predicted final hidden state of the frozen model.

    `linear`: sum_k act_k W[index_k] + b. `transformer`: the same sum is read as the residual
    stream at the door of the first of a few blocks (`BlockDecoder`), which look back over the
    latents of earlier positions.
    """

    config_class = SaeDecoderConfig
    base_model_prefix = "model"
    main_input_name = "latents"
    _supports_sdpa = True

    def __init__(self, config: SaeDecoderConfig) -> None:
        super().__init__(config)
        self.W = nn.Parameter(torch.empty(config.num_latents, config.d_model))
        self.b = nn.Parameter(torch.empty(config.d_model))
        # Their weights are saved under this name.
        self.blocks: UpperPart = (
            BlockDecoder(config) if config.kind == "transformer" else LinearDecoder()
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Without super(), buffers of submodules stay uninitialised after a meta-device load.
        super()._init_weights(module)
        if isinstance(module, SaeDecoderModel):
            init.normal_(module.W, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.b)
        elif isinstance(module, BlockDecoder):
            init.zeros_(module.sinks)
            for linear in module.maps():
                init.copy_(linear.weight, torch.eye(self.config.d_model))
                init.zeros_(linear.bias)

    def forward(
        self,
        latents: SparseLatents,
        attention_mask: Shaped[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "#batch length"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "*places d_model"]:
        """Predicted final hidden states [..., D] from latents [..., K].

        Args:
            latents: [..., K] for `linear`; [B, T, K], with all positions from 0 on or from where
                the cache ends, for `transformer`.
            attention_mask: [B, S], 0 for padding; `linear` has no use for it.
            position_ids: [B, T].
            past_key_values: the trunk's cache with room for the decoder's own layers.
        """
        resid = decode_sparse(latents, self.W, self.b)
        cache = None
        if past_key_values is not None and self.blocks.looks_back:
            depth = len(self.blocks.numbers)
            cache = own_layers(past_key_values, self.config.hook_layer, depth)
        hidden: Tensor = self.blocks(
            resid, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
        )
        return hidden


class SaeDecoderForCausalLM(PreTrainedModel, GenerationMixin):
    """The feature decoder with the frozen unembedding: logits from SAE latents alone.

    The frozen model and the SAE are attached with `attach`, outside the module tree: they are
    neither trained nor saved, and keep their own dtype when the decoder is cast.

    The SAE is never trained on sequence position 0 (an attention sink with a huge norm); the
    decoder still predicts there, but no quality is claimed for that position.
    """

    config_class = SaeDecoderConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: SaeDecoderConfig) -> None:
        super().__init__(config)
        self._frozen: FrozenParts | None = None
        self.model = SaeDecoderModel(config)
        self.post_init()

    @property
    def W(self) -> nn.Parameter:
        """[num_latents, D]: what a unit of each latent adds."""
        return self.model.W

    @property
    def b(self) -> nn.Parameter:
        """[D]: what is there without any latent."""
        return self.model.b

    @property
    def upper(self) -> UpperPart:
        """What follows on the latents' sum."""
        return self.model.blocks

    @property
    def trunk_config(self) -> Any:
        """The frozen model's own configuration."""
        return self.frozen.lm.model.config

    @property
    def looks_back(self) -> bool:
        """Whether latents of earlier positions move a prediction: not for `linear`."""
        return self.upper.looks_back

    @property
    def blocks(self) -> BlockDecoder:
        """The blocks over the positions.

        Raises:
            BadInputError: the decoder is `linear`.
        """
        if not isinstance(self.upper, BlockDecoder):
            raise BadInputError(
                "A linear decoder has no blocks.",
                "It reads each position by itself.",
                "Ask `looks_back` first, or set `train_decoder.depth` to 1 or more.",
            )
        return self.upper

    def attach(self, lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
        """Give the decoder its frozen model and SAE; returns itself.

        Raises:
            BadInputError: their sizes or their hook layer differ from the decoder's config.
        """
        for name, expected, found in (
            ("d_model of the model", self.config.d_model, lm.d_model),
            ("vocab_size of the model", self.config.vocab_size, lm.unembedding.shape[0]),
            ("d_model of the SAE", self.config.d_model, sae.spec.d_model),
            ("num_latents of the SAE", self.config.num_latents, sae.spec.num_latents),
            ("hook_layer of the SAE", self.config.hook_layer, sae.spec.hook_layer),
        ):
            if expected != found:
                raise BadInputError(
                    f"The {name} is {found}, but the decoder was made for {expected}.",
                    "A decoder works only with the model and the SAE it was trained on.",
                    "Give it those of its own run.",
                )
        sae.requires_grad_(False)
        self._frozen = FrozenParts(lm, sae)
        return self

    @property
    def frozen(self) -> FrozenParts:
        """The attached frozen model and SAE.

        Raises:
            BadInputError: nothing is attached yet.
        """
        if self._frozen is None:
            raise BadInputError(
                "The decoder has no frozen model.",
                "Only the decoder's own weights are saved with it.",
                "Call attach(lm, sae), or load it with rldecoder.decoder.loading.load_decoder.",
            )
        return self._frozen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SaeDecoderForCausalLM:
        # `.to(device)` must reach the frozen parts; their dtype is theirs, so `fn` must not.
        super()._apply(fn, recurse)
        if self._frozen is not None and self.W.device.type != "meta":
            self._frozen.lm.model.to(self.W.device)  # type: ignore[arg-type]  # wrapped untyped
            self._frozen.sae.to(self.W.device)
        return self

    @torch.no_grad()
    def features(
        self,
        input_ids: Int[Tensor, "batch length"],
        attention_mask: Shaped[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "#batch length"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> FeaturesOutput:
        """Run the frozen model to the hook layer and encode: latents [B, T, K], no gradient.

        Args:
            input_ids: [B, T], only the tokens that `past_key_values` does not hold yet.
            attention_mask: [B, T_past + T], 0 for padding (on the left for generation).
            position_ids: [B, T]; counted from the mask when absent.
            past_key_values: the trunk's cache; it is extended in place.
            use_cache: make a cache when none is given.
        """
        lm, sae = self.frozen.lm, self.frozen.sae
        position_ids = count_positions(attention_mask, position_ids, input_ids.shape[1])
        trunk = lm.trunk(
            input_ids,
            self.config.hook_layer,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        latents = sae.encode(trunk.resid.float())
        return FeaturesOutput(latents, trunk.past_key_values, trunk.resid)

    def hidden(
        self,
        latents: SparseLatents,
        attention_mask: Shaped[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "#batch length"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "*places d_model"]:
        """Predicted final (normed) hidden state [..., D]; see `SaeDecoderModel.forward`."""
        predicted: Tensor = self.model(latents, attention_mask, position_ids, past_key_values)
        return predicted

    def logits(self, latents: SparseLatents) -> Float[Tensor, "*places vocab"]:
        """Next-token logits [..., V], float32, from latents [..., K] ([B, T, K] with blocks)."""
        return self.frozen.lm.unembed(self.hidden(latents))

    def contributions(
        self, latents: SparseLatents, token_ids: Int[Tensor, " *places"]
    ) -> Float[Tensor, "*places active"]:
        """What each active latent adds to the logit of one token a position: [..., K].

        act_k * (W[index_k] . U[token]): with the bias part `b . U[token]` they sum to the
        token's logit exactly (the linear decoder has no interactions). Differentiable with
        respect to `W`. Needs N * K * D floats of memory for N positions.

        Args:
            latents: acts and indices [..., K].
            token_ids: [...], the token whose logit is explained.

        Raises:
            BadInputError: the decoder has blocks; `attributions` is for those.
        """
        if self.looks_back:
            raise BadInputError(
                "An exact split of a logit over latents needs a linear decoder.",
                f"This one has {len(self.upper.numbers)} blocks over the positions, so that a "
                "prediction is no sum over the latents of one position.",
                "Ask for `attributions`, which are first-order, or set `train_decoder.depth: 0`.",
            )
        return self.along(latents, self.frozen.lm.unembedding[token_ids].to(self.W.dtype))

    def direct(self, latents: Int[Tensor, " some"]) -> Float[Tensor, "some d_model"]:
        """What one unit of each latent [n] adds by itself to the final hidden state: [n, D].

        `linear`: its row, exactly. With blocks: its row's own way past them, of unit length at
        the final norm (`BlockDecoder.direct`): sizes mean little, the order of tokens much.
        """
        return self.upper.direct(self.W[latents])

    def along(
        self, latents: SparseLatents, directions: Float[Tensor, "*places d_model"]
    ) -> Float[Tensor, "*places active"]:
        """act_k * (W[index_k] . direction): [..., K], differentiable with respect to `W`.

        Args:
            latents: [..., K].
            directions: [..., D].
        """
        rows = F.embedding(latents.indices, self.W)
        return latents.acts * torch.einsum("...kd,...d->...k", rows, directions)

    @torch.enable_grad()
    def attributions(
        self,
        latents: SparseLatents,
        token_ids: Int[Tensor, " batch"],
        attention_mask: Shaped[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length active"]:
        """What each latent of every position adds to the logit after the last one: [B, T, K].

        Activation times gradient (Simonyan et al. 2013, arXiv 1312.6034): for `linear` exact, and
        zero but at the last position; for `transformer` the first-order part of the effect.

        Args:
            latents: [B, T, K] of whole sequences, padding on the left.
            token_ids: [B], the token whose logit is explained.
            attention_mask: [B, T], 0 for padding.
        """
        acts = latents.acts.detach().requires_grad_()
        positions = count_positions(attention_mask, None, acts.shape[1])
        hidden = self.hidden(SparseLatents(acts, latents.indices), attention_mask, positions)
        logits = self.frozen.lm.unembed(hidden[:, -1])
        (slope,) = torch.autograd.grad(logits.gather(-1, token_ids[:, None]).sum(), acts)
        return acts.detach() * slope

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Shaped[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "#batch length"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        latents: SparseLatents | None = None,
        logits_to_keep: int | Int[Tensor, " some"] = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T or fewer, V] of the next token.

        Args:
            input_ids: [B, T]; not needed when `latents` are given.
            attention_mask, position_ids, past_key_values, use_cache: see `features`.
            latents: [B, T, K] from an earlier `features`: neither the frozen trunk nor the SAE
                runs, and the cache is left alone.
            logits_to_keep: how many last positions get logits (0: all), or their indices [n].
            kwargs: what `generate` and trainers pass along and this model has no use for.

        Raises:
            BadInputError: neither tokens nor latents are given, or nothing is attached.
        """
        if latents is None:
            if input_ids is None:
                raise BadInputError(
                    "The decoder got neither input_ids nor latents.",
                    "It has nothing to decode.",
                    "Pass one of them.",
                )
            position_ids = count_positions(attention_mask, position_ids, input_ids.shape[1])
            if position_ids is None and past_key_values is not None:
                start = past_key_values.get_seq_length()
                position_ids = torch.arange(
                    start, start + input_ids.shape[1], device=input_ids.device
                )[None]
            use_cache = self.config.use_cache if use_cache is None else use_cache
            seen = self.features(
                input_ids, attention_mask, position_ids, past_key_values, use_cache
            )
            latents = seen.latents
            cache = past_key_values = seen.past_key_values
        else:
            cache = None
            position_ids = count_positions(attention_mask, position_ids, latents.acts.shape[-2])

        keep = (
            slice(-logits_to_keep if logits_to_keep else None, None)
            if isinstance(logits_to_keep, int)
            else logits_to_keep
        )
        if not self.looks_back:  # positions are independent: the others need no prediction
            latents = SparseLatents(latents.acts[..., keep, :], latents.indices[..., keep, :])
            keep = slice(None)
        hidden = self.hidden(latents, attention_mask, position_ids, cache)[..., keep, :]
        return CausalLMOutputWithPast(
            logits=self.frozen.lm.unembed(hidden), past_key_values=past_key_values
        )


def new_decoder(lm: FrozenLM, sae: Sae, blocks: Sequence[int] = ()) -> SaeDecoderForCausalLM:
    """An untrained decoder (global RNG) of the right shape, attached to `lm` and `sae`.

    Args:
        blocks: numbers of the frozen model's blocks that it has the like of; none: linear.
    """
    ends = lm.end_token_ids
    end = ends if len(ends) > 1 else lm.eos_token_id
    config = SaeDecoderConfig(
        kind="transformer" if blocks else "linear",
        d_model=lm.d_model,
        vocab_size=lm.unembedding.shape[0],
        num_latents=sae.spec.num_latents,
        hook_layer=sae.spec.hook_layer,
        blocks=list(blocks) or None,
        block_config=without_folder(lm.model.config.to_dict()) if blocks else None,
        max_position_embeddings=lm.context_length,
        base_model=sae.spec.model_name,
        eos_token_id=end,
        pad_token_id=lm.pad_token_id,
        bos_token_id=getattr(lm.model.config, "bos_token_id", None),
    )
    decoder = SaeDecoderForCausalLM(config).attach(lm, sae)
    decoder.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=lm.pad_token_id)
    return decoder.to(lm.device).eval()  # type: ignore[arg-type]  # wrapped untyped


AutoModel.register(SaeDecoderConfig, SaeDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(SaeDecoderConfig, SaeDecoderForCausalLM, exist_ok=True)

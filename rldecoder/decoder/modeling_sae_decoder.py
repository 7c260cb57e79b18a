"""`SaeDecoderForCausalLM`: a causal LM that may look at nothing but SAE latents.

The frozen model runs up to the hook layer, the SAE encodes the residual stream there, and the
decoder turns the latents into the frozen model's final hidden state; the frozen unembedding
makes logits of it. Neither the SAE's error term nor the residual reaches the decoder.

Axes: B sequence, T position, K active latents, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from rldecoder.decoder.configuration_sae_decoder import SaeDecoderConfig
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse


class FeaturesOutput(NamedTuple):
    """What the frozen part of the decoder gives."""

    latents: SparseLatents
    """Active latents, acts and indices [B, T, K]."""
    past_key_values: Cache | None
    """The trunk's cache (L layers), when one was asked for."""


@dataclass(frozen=True, eq=False)
class FrozenParts:
    """The frozen model and SAE of a decoder. Copies of the decoder share them."""

    lm: FrozenLM
    sae: Sae

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenParts:
        return self


class SaeDecoderForCausalLM(PreTrainedModel, GenerationMixin):
    """The linear feature decoder: final hidden state = sum_k act_k W[index_k] + b.

    `W` [num_latents, D] and `b` [D] are its only parameters. The frozen model and the SAE are
    attached with `attach`, outside the module tree: they are neither trained nor saved, and
    keep their own dtype when the decoder is cast.

    The SAE is never trained on sequence position 0 (an attention sink with a huge norm); the
    decoder still predicts there, but no quality is claimed for that position.
    """

    config_class = SaeDecoderConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: SaeDecoderConfig) -> None:
        super().__init__(config)
        self._frozen: FrozenParts | None = None
        self.W = nn.Parameter(torch.empty(config.num_latents, config.d_model))
        self.b = nn.Parameter(torch.empty(config.d_model))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Without super(), buffers of submodules stay uninitialised after a meta-device load.
        super()._init_weights(module)
        if isinstance(module, SaeDecoderForCausalLM):
            init.normal_(module.W, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.b)

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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
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
        if position_ids is None and attention_mask is not None:
            position_ids = attention_mask.long().cumsum(-1).sub(1).clamp_min(0)
            position_ids = position_ids[:, -input_ids.shape[1] :]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        trunk = lm.trunk(
            input_ids,
            self.config.hook_layer,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return FeaturesOutput(sae.encode(trunk.resid.float()), trunk.past_key_values)

    def hidden(self, latents: SparseLatents) -> Tensor:
        """Predicted final (normed) hidden state [..., D] from latents [..., K]."""
        return decode_sparse(latents, self.W, self.b)

    def logits(self, latents: SparseLatents) -> Tensor:
        """Next-token logits [..., V], float32, from latents [..., K]."""
        return self.frozen.lm.unembed(self.hidden(latents))

    def contributions(self, latents: SparseLatents, token_ids: Tensor) -> Tensor:
        """What each active latent adds to the logit of one token a position: [..., K].

        act_k * (W[index_k] . U[token]): with the bias part `b . U[token]` they sum to the
        token's logit exactly (the linear decoder has no interactions). Differentiable with
        respect to `W`. Needs N * K * D floats of memory for N positions.

        Args:
            latents: acts and indices [..., K].
            token_ids: [...], the token whose logit is explained.
        """
        direction = self.frozen.lm.unembedding[token_ids].to(self.W.dtype)
        rows = F.embedding(latents.indices, self.W)
        return latents.acts * torch.einsum("...kd,...d->...k", rows, direction)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        latents: SparseLatents | None = None,
        logits_to_keep: int | Tensor = 0,
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
            latents, past_key_values = self.features(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                self.config.use_cache if use_cache is None else use_cache,
            )
        keep = (
            slice(-logits_to_keep if logits_to_keep else None, None)
            if isinstance(logits_to_keep, int)
            else logits_to_keep
        )
        kept = SparseLatents(latents.acts[..., keep, :], latents.indices[..., keep, :])
        return CausalLMOutputWithPast(logits=self.logits(kept), past_key_values=past_key_values)


def new_decoder(lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
    """An untrained decoder (global RNG) of the right shape, attached to `lm` and `sae`."""
    config = SaeDecoderConfig(
        d_model=lm.d_model,
        vocab_size=lm.unembedding.shape[0],
        num_latents=sae.spec.num_latents,
        hook_layer=sae.spec.hook_layer,
        max_position_embeddings=lm.model.config.max_position_embeddings,
        base_model=sae.spec.model_name,
        eos_token_id=lm.eos_token_id,
        pad_token_id=lm.pad_token_id,
        bos_token_id=lm.model.config.bos_token_id,
    )
    decoder = SaeDecoderForCausalLM(config).attach(lm, sae)
    decoder.generation_config = GenerationConfig(
        eos_token_id=lm.eos_token_id, pad_token_id=lm.pad_token_id
    )
    return decoder.to(lm.device).eval()  # type: ignore[arg-type]  # wrapped untyped


AutoModelForCausalLM.register(SaeDecoderConfig, SaeDecoderForCausalLM, exist_ok=True)

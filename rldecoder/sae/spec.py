"""The shape of an SAE and where in which model it sits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rldecoder.config.base import Config


class SaeSpec(Config):
    """What a reader of an SAE must know beside its weights."""

    architecture: Literal["topk", "relu", "jumprelu"] = "topk"
    """`topk` keeps the k largest positive pre-activations of a token, `relu` all positive ones,
    `jumprelu` those above each latent's threshold (as SAEs trained with `batchtopk` and
    `matryoshka` are read, too)."""
    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    num_latents: int = Field(gt=0)
    """Number of dictionary columns."""
    k: int | None = None
    """Latents kept per token; for `topk` only."""
    hook_layer: int = Field(default=0, ge=0)
    """The residual stream after this many blocks."""
    model_name: str = ""
    """The language model whose residuals it reads."""
    context_length: int | None = None
    """Tokens per sequence of its training text; informative."""
    trained_as: str = ""
    """The architecture in training, where it has another name; informative."""
    b_dec_is_subtracted: bool = True
    """Whether the encoder reads residuals less b_dec, as all SAEs trained here do, or as they are,
    as Gemma Scope's do (`apply_b_dec_to_input` of sae_lens)."""
    dtype: Literal["float32"] = "float32"
    """Of the weights on disk and of the computation."""

    @model_validator(mode="after")
    def _check(self) -> SaeSpec:
        if self.architecture == "topk":
            if self.k is None or not 0 < self.k <= self.num_latents:
                raise ValueError(
                    f"topk needs 1 <= k <= num_latents={self.num_latents}, got {self.k}"
                )
        elif self.k is not None:
            raise ValueError("k belongs to the topk architecture only")
        return self

    @property
    def model(self) -> str:
        """The model's name without its owner, as TransformerLens, the hub and folders write it."""
        return self.model_name.rsplit("/", 1)[-1].lower().removesuffix("-small")

    @property
    def hook_name(self) -> str:
        """The hook point in TransformerLens words, as sae_lens expects it."""
        if self.hook_layer == 0:
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.hook_layer - 1}.hook_resid_post"

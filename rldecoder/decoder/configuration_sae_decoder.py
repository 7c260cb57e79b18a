"""Configuration of the feature decoder, in transformers' own form."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


@strict
class SaeDecoderConfig(PreTrainedConfig):
    """Shapes of a `SaeDecoderForCausalLM` and of the frozen parts it must be attached to.

    Fields:
        kind: `linear`, latents -> final hidden state -> logits through the frozen unembedding;
            `transformer`, the same with blocks over the positions in between.
        d_model: width of the frozen model's residual stream.
        vocab_size: rows of the frozen unembedding.
        num_latents: columns of the SAE dictionary.
        hook_layer: L >= 1; the SAE reads the residual stream after L blocks.
        blocks: numbers of the frozen model's blocks (from 0) whose shape the decoder's own have,
            rising; none for `linear`.
        block_config: the frozen model's configuration as a dict; it says how a block is made.
        max_position_embeddings: longest sequence that the frozen model accepts, in tokens.
        base_model: name of the frozen model, for people.
    """

    model_type = "sae_decoder"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model"}

    kind: Literal["linear", "transformer"] = "linear"
    d_model: int = 64
    vocab_size: int = 512
    num_latents: int = 256
    hook_layer: int = 1
    blocks: list[int] | None = None
    block_config: dict[str, Any] | None = None
    max_position_embeddings: int = 512
    base_model: str = ""
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the KV cache: the trunk's L blocks, then the decoder's own."""
        return self.hook_layer + len(self.blocks or ())

    def validate_architecture(self) -> None:
        """Refuse sizes that no model has (called by transformers after construction).

        Raises:
            ValueError: a size is not positive, or the blocks do not fit the kind (wrapped by
                transformers' own validation error).
        """
        for name in ("d_model", "vocab_size", "num_latents", "hook_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        blocks = self.blocks or []
        fits = not blocks if self.kind == "linear" else bool(blocks and self.block_config)
        if not fits:
            raise ValueError(f"a {self.kind} decoder cannot have the blocks {blocks}")
        if sorted(set(blocks)) != list(blocks):
            raise ValueError(f"the blocks must rise, got {blocks}")


def without_folder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration without the folder that the model was loaded from: what is published
    says nothing of the machine that it was made on."""
    return {name: value for name, value in settings.items() if name != "_name_or_path"}


AutoConfig.register("sae_decoder", SaeDecoderConfig, exist_ok=True)

"""Settings of the model and its tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rldecoder.config.base import Config, HubRepo, Revision, StageConfig, free

RANDOM = "random"
"""The `model` that is made on the spot."""


class RandomModelConfig(Config):
    """Sizes of the model that `model: random` makes on the spot."""

    architecture: Literal["gpt2", "llama"] = "gpt2"
    """`gpt2`: learned positions, LayerNorm. `llama`: rotary positions, RMSNorm, gated MLP."""
    n_layer: int = Field(default=4, ge=1)
    """Transformer blocks."""
    d_model: int = Field(default=64, ge=2)
    """Width of the residual stream."""
    n_head: int = Field(default=4, ge=1)
    """Attention heads a block."""
    vocab_size: int = Field(default=512, ge=257)
    """Tokens of its byte-level BPE: 256 bytes, one special token, and merges."""
    n_positions: int = Field(default=512, ge=2)
    """Longest sequence in tokens."""


class SyncTokenizerConfig(StageConfig):
    """Which frozen model the run decodes, and where its files come from."""

    model: str = "smollm2-135m-instruct"
    """A spec of configs/models (`rldecoder models` lists them) or the path of your own spec
    (.yaml); or `folder` (takes `path`), `hub` (takes `repo`), `random` (takes `random_model`)."""
    path: str | None = free(None)
    """A local Hugging Face folder with the model. With a spec it is used instead of the spec's
    sources. Its content, not its place, identifies the result."""
    repo: HubRepo | None = None
    """`organisation/name` on the Hugging Face hub, for `model: hub`; its cache is tried first."""
    revision: Revision = "main"
    """Commit or branch of `repo`."""
    random_model: RandomModelConfig = RandomModelConfig()
    """Sizes, for `model: random`."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The dtype in which all later stages run the frozen model. A CPU that is not faster
    with bfloat16 (x86 before AVX-512, Intel's without AMX) takes float32 in its place."""
    extra_probes: tuple[str, ...] = ()
    """More texts that the tokenizer must return unchanged."""
    allow_lossy_tokenizer: bool = False
    """Accept a tokenizer that does not return every probe unchanged (the report says which)."""

    @model_validator(mode="after")
    def _needs_its_source(self) -> SyncTokenizerConfig:
        if self.model == "folder" and self.path is None:
            raise ValueError("model: folder needs `path`, the folder with the model's files")
        if self.model == "hub" and self.repo is None:
            raise ValueError("model: hub needs `repo`, such as openai-community/gpt2")
        if self.model != "hub" and self.repo is not None:
            raise ValueError("`repo` is only read with model: hub; a spec names its own")
        if self.model in ("hub", "random") and self.path is not None:
            raise ValueError(f"`path` is not read with model: {self.model}; use model: folder")
        return self

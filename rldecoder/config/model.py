"""Settings of the model and its tokenizer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rldecoder.config.base import Config, HubRepo, Revision, StageConfig, free, late, name_on_hub
from rldecoder.config.data import Bos

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


class Loading(Config):
    """How the frozen model's weights are kept while it runs."""

    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Bits of the blocks' weights (bitsandbytes)."""
    device_map: Literal["one", "auto"] = "one"
    """`one` device, or wherever there is room."""
    offload: bool = False
    """Whether blocks may be on the disk."""


class SyncTokenizerConfig(StageConfig):
    """Which frozen model the run decodes, and where its files come from."""

    model: str = "smollm2-135m-instruct"
    """A spec of configs/models (`rldecoder models` lists them) or the path of your own spec
    (.yaml); a name on the hub with a slash (`google/gemma-2-2b`, the same as `hub` with `repo`);
    or `folder` (takes `path`), `hub` (takes `repo`), `random` (takes `random_model`)."""
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
    quantization: Literal["none", "8bit", "4bit"] = late("none")
    """Weights of 8 or 4 bits (bitsandbytes, extra `quantized`), for models that are too large
    else. All stages then run the quantised model. Decoders with blocks need `none`."""
    device_map: Literal["one", "auto"] = late("one")
    """`auto` keeps what does not fit on the stage's device in the machine's memory: slow, and only
    for stages that send no gradient through the frozen blocks."""
    offload: bool = late(False)
    """With `device_map: auto`: what does not fit there either is on the disk, in the per-user
    cache (`RLDECODER_CACHE`)."""
    bos: Bos = late("auto")
    """Taken from `ingest.bos`, where it is to be set."""
    extra_probes: tuple[str, ...] = ()
    """More texts that the tokenizer must return unchanged."""
    allow_lossy_tokenizer: bool = False
    """Accept a tokenizer that does not return every probe unchanged (the report says which)."""

    @model_validator(mode="before")
    @classmethod
    def _hub_name(cls, values: Any) -> Any:
        return name_on_hub(values)

    @property
    def loading(self) -> Loading:
        """How the weights are kept."""
        return Loading(
            quantization=self.quantization, device_map=self.device_map, offload=self.offload
        )

    @model_validator(mode="after")
    def _offload_has_a_map(self) -> SyncTokenizerConfig:
        if self.offload and self.device_map != "auto":
            raise ValueError("`offload` is only read with device_map: auto")
        return self

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

"""The sizes of a run's model, from its spec or its config.json: no weights are read.

Axes in the formulas: T tokens a sequence, D model width, V vocabulary, L latents. One
multiply-add is 2 FLOPs. Only matrix products count: norms, softmax and copies are some percent.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rldecoder.config.model import RANDOM, SyncTokenizerConfig
from rldecoder.errors import BadInputError, RlDecoderError
from rldecoder.lm import specs
from rldecoder.lm.model_sources import SourceUnavailableError, locate_one
from rldecoder.lm.registry import choose_model
from rldecoder.lm.wheel import wheel_model_folder

HALF_PRECISION_FROM = 500_000_000
"""Parameters from which published weights are usually bfloat16; smaller ones are often float32."""


class ModelSizes(NamedTuple):
    """A model's constants with what they imply for work and weight."""

    constants: specs.ArchitectureConstants
    weight_bytes: int
    """Of the weight files: as they are where the model is here, else a usual width a parameter."""

    @property
    def block_parameters(self) -> int:
        """Weights of one block; the final norm and learned positions are spread over the blocks."""
        c = self.constants
        tables = c.vocab_size * c.d_model * (1 if c.tied_embeddings else 2)
        return max(0, c.parameters - tables) // c.num_layers

    @property
    def unembed_flops(self) -> float:
        """FLOPs of the logits of one token."""
        return 2.0 * self.constants.vocab_size * self.constants.d_model

    def blocks_flops(self, count: int, context_length: int) -> float:
        """FLOPs of `count` blocks, a token, forward; attention over all T positions, as it is
        computed where no kernel leaves the masked half out."""
        attention = 4 * context_length * self.constants.num_heads * self.constants.head_dim
        return count * (2 * self.block_parameters + attention)

    def forward_flops(self, context_length: int) -> float:
        """FLOPs of the whole model, a token, forward, logits included."""
        return self.blocks_flops(self.constants.num_layers, context_length) + self.unembed_flops


def sizes_of(constants: specs.ArchitectureConstants) -> ModelSizes:
    """Of a model whose weight files are not at hand."""
    width = 2 if constants.parameters >= HALF_PRECISION_FROM else 4
    return ModelSizes(constants, width * constants.parameters)


def model_sizes(config: SyncTokenizerConfig) -> ModelSizes:
    """The sizes of the model that a run names.

    Raises:
        BadInputError: the model has no spec and its config.json is not on this machine.
    """
    if config.model == RANDOM:
        made = _random_constants(config)
        return ModelSizes(made, 4 * made.parameters)
    choice = choose_model(
        config.model, path=config.path, repo=config.repo, revision=config.revision
    )
    folder = next(filter(None, map(_folder, choice.sources)), None)

    # A folder that is here says how many bytes its weights have; a spec says all else.
    found = sorted(folder.glob("model*.safetensors")) if folder is not None else []
    weight_bytes = sum(path.stat().st_size for path in found)
    if choice.spec is not None:
        constants = choice.spec.architecture
    elif folder is not None:
        constants = _read_constants(folder)
    else:
        raise BadInputError(
            f"The sizes of {choice.name} are not known.",
            "It has no spec, and its config.json is not on this machine.",
            "Fetch its config.json into the Hugging Face cache (`hf download REPO config.json`), "
            "or write a spec for it (configs/models/).",
        )
    return ModelSizes(constants, weight_bytes) if weight_bytes else sizes_of(constants)


def _folder(source: specs.ModelSource) -> Path | None:
    """Where a source has the model on this machine; nothing is hashed, no network is used."""
    if isinstance(source, specs.LocalSource):
        folder: Path | None = Path(source.path).expanduser()
    elif isinstance(source, specs.WheelSource):
        folder = wheel_model_folder(source)
    elif isinstance(source, specs.HfCacheSource):
        try:
            folder = locate_one(source).folder
        except (SourceUnavailableError, RlDecoderError):
            return None
    else:
        return None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _random_constants(config: SyncTokenizerConfig) -> specs.ArchitectureConstants:
    """Of the model that `make_random_model` would make."""
    from rldecoder.lm.random_model import random_config

    sizes = config.random_model
    made = random_config(**sizes.model_dump())
    return specs.read_constants(made, _count(made), sizes.n_positions)


def _read_constants(folder: Path) -> specs.ArchitectureConstants:
    """Constants of a folder's config.json."""
    from rldecoder.lm.loading import read_config
    from rldecoder.lm.text_part import text_part

    config = text_part(read_config(folder)).config
    return specs.read_constants(config, _count(config))


def _count(config: object) -> int:
    """Parameters of the model that a config describes, tied ones once; none is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())

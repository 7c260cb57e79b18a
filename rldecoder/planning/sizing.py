"""A run with the sizes of its model: the quantities that every stage's arithmetic starts from."""

from __future__ import annotations

from typing import NamedTuple

from rldecoder.config.data import SplitTokens
from rldecoder.config.run import RunConfig
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.planning.sizes import ModelSizes

BASE_BYTES = 500 << 20
"""Of a process with Python, torch and this program (measured: 460 MiB)."""
FLOAT_BYTES = 4
CHECKPOINTS = 2
"""That a stage keeps while it trains."""
PART_TOKENS = 4096
"""Tokens whose logits, or latents' pre-activations, exist at one time."""
ROLLOUT_TOKENS = 64
"""Prompt and response of a generated task together, taken as this many tokens."""
PAGE_BYTES = 1 << 20
"""Tables, figures and pages of a stage that keeps nothing else."""
SENSE_OF_DENSE = 0.05
"""Share of latents from which an SAE without k computes densely; taken as what it has active."""


class Cost(NamedTuple):
    """What one stage takes."""

    tokens: int = 0
    """That go through a model: the frozen one, the SAE or the decoder."""
    flops: float = 0.0
    disk_bytes: int = PAGE_BYTES
    """That the published artifact keeps."""
    scratch_bytes: int = 0
    """Beside it, until it is published."""
    memory_bytes: int = BASE_BYTES


class Sizing(NamedTuple):
    """A run with the sizes of its model: what every stage's arithmetic starts from."""

    run: RunConfig
    model: ModelSizes

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return self.run.ingest.context_length

    @property
    def hook(self) -> int:
        """Blocks below the hook layer."""
        return min(self.run.cache_activations.hook_layer, self.model.constants.num_layers)

    @property
    def d_model(self) -> int:
        """D."""
        return self.model.constants.d_model

    @property
    def num_latents(self) -> int:
        """L, of the SAE of `train_sae`."""
        return max(1, round(self.run.train_sae.expansion * self.d_model))

    @property
    def encode(self) -> float:
        """FLOPs of one token's latents."""
        return 2.0 * self.d_model * self.num_latents

    @property
    def forward(self) -> float:
        """FLOPs of one token through the whole frozen model."""
        return self.model.forward_flops(self.length)

    @property
    def tail(self) -> float:
        """FLOPs of one token through the blocks above the hook layer, and the logits."""
        above = self.model.constants.num_layers - self.hook
        return self.model.blocks_flops(above, self.length) + self.model.unembed_flops

    @property
    def trunk(self) -> float:
        """FLOPs of one token through the blocks up to the hook layer."""
        return self.model.blocks_flops(self.hook, self.length)

    @property
    def weights(self) -> int:
        """Bytes of the frozen model in memory."""
        config = self.run.sync_tokenizer
        bits = {"8bit": 8, "4bit": 4}.get(config.quantization)
        width = bits / 8 if bits else (2 if config.compute_dtype == "bfloat16" else 4)
        return int(self.model.constants.parameters * width)

    @property
    def logits(self) -> int:
        """Bytes of the logits of one part of a batch, and of their gradient."""
        return 2 * PART_TOKENS * self.model.constants.vocab_size * FLOAT_BYTES

    @property
    def decoder_bytes(self) -> int:
        """Bytes of the decoder's weights: the map from latents, and blocks where it has some."""
        depth = self.run.train_decoder.depth
        blocks = (max(self.run.frontier.depths, default=0) if depth == "auto" else depth) * (
            self.model.block_parameters + self.d_model**2
        )
        return FLOAT_BYTES * (self.num_latents * self.d_model + self.d_model + blocks)

    @property
    def decode(self) -> float:
        """FLOPs of one token through the decoder, logits included."""
        depth = self.run.train_decoder.depth
        blocks = max(self.run.frontier.depths, default=0) if depth == "auto" else depth
        active = 2.0 * self.run.train_sae.k * self.d_model
        return active + self.model.blocks_flops(blocks, self.length) + self.model.unembed_flops


def sequences(budget: SplitTokens, length: int) -> dict[str, int]:
    """Whole sequences of each split that has any."""
    found = {name: getattr(budget, name) // length for name in type(budget).model_fields}
    return {name: count for name, count in found.items() if count}


def sae_step_flops(config: TrainSaeConfig, d_model: int, num_latents: int) -> float:
    """FLOPs of training on one token: one dense product, and five along the active pairs.

    Decoding, the exact encoding of the pairs, and three gradients; AuxK's share comes on top while
    latents are dead.
    """
    few = config.architecture in ("topk", "batchtopk", "matryoshka")
    active = config.k if few else SENSE_OF_DENSE * num_latents
    return 2.0 * d_model * num_latents + 10.0 * active * d_model


def sae_bytes(d_model: int, num_latents: int) -> int:
    """Bytes of an SAE's weights: encoder, decoder, biases and thresholds."""
    return FLOAT_BYTES * (2 * d_model * num_latents + 2 * num_latents + d_model)

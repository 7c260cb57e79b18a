"""Settings of the SAE's training and of its quality gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rldecoder.config.base import Config, OnFail, StageConfig, free


def _rises(band: tuple[float, float]) -> tuple[float, float]:
    if band[0] > band[1]:
        raise ValueError(f"the band {band[0]:g} to {band[1]:g} has nothing in it")
    return band


Band = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], AfterValidator(_rises)]


class SparsityPhase(Config):
    """A stretch of training with one sparsity coefficient."""

    steps: int = Field(gt=0)
    """Optimiser steps that it lasts."""
    coefficient: float = Field(ge=0)
    """Weight of the L1 term against the mean squared error per element of scaled inputs."""


class Retraining(Config):
    """Training that goes on from a published SAE, with new directions for bad latents."""

    sae: Path
    """Folder of the SAE, `sae/` of a `train_sae` artifact (sae_lens layout)."""
    clusters: Path | None = None
    """`clusters.json` of the `cluster_features` artifact made over that SAE: latents that it flags
    are resampled at the first step, whatever the architecture."""
    reasons: tuple[Literal["dead", "ultra_dense", "label_failed"], ...] = ("dead", "ultra_dense")
    """Flags that count."""


class PretrainedSae(Config):
    """Somebody else's SAE in place of training: a folder, or a release that sae_lens knows.

    What a folder does not say of itself is said here; what it says may not be contradicted.
    """

    folder: Path | None = free(None)
    """A folder of sae_lens, of Gemma Scope (`params.npz`, `params.safetensors`), of sparsify, or
    of Qwen Scope (converted to safetensors). Its content, not its place, is part of the digest."""
    release: str | None = free(None, min_length=1)
    """A release of sae_lens, such as `gemma-scope-2b-pt-res-canonical`; or a repository on the hub
    that sae_lens can read. Needs `pip install -e '.[pretrained]'` the first time."""
    id: str | None = free(None, min_length=1)
    """The SAE within the release, such as `layer_12/width_16k/canonical`."""
    hook_name: str | None = None
    """Which residual stream it reads: `blocks.12.hook_resid_post` or `model.layers.12`."""
    model_name: str | None = None
    """The language model that it was trained on."""
    k: PositiveInt | None = None
    """Active latents a token, of a TopK SAE."""
    context_size: PositiveInt | None = None
    """Tokens per sequence of its training text."""
    prepend_bos: bool | None = None
    """Whether its training text began with the BOS token."""
    center_writing_weights: bool | None = None
    """Whether its model's weights were centred (TransformerLens does so unless told otherwise).
    Such an SAE cannot be used; old configs of GPT-2 SAEs do not say which they are."""
    norm_scaling_factor: float | None = Field(None, gt=0)
    """By what its inputs were multiplied, where `normalize_activations` is
    `expected_average_only_in`: folded into the weights."""
    accept: tuple[Literal["bos", "context_length"], ...] = ()
    """Differences between the SAE's training text and this run's to go on with, under a caveat
    that follows all results."""

    @model_validator(mode="after")
    def _one_source(self) -> PretrainedSae:
        if (self.folder is None) == (self.release is None):
            raise ValueError("give either folder, or release and id")
        if (self.release is None) != (self.id is None):
            raise ValueError("release and id belong together")
        return self

    @property
    def stated(self) -> dict[str, Any]:
        """What is said here of the SAE, in sae_lens's words."""
        own = {"folder", "release", "id", "accept"}
        return self.model_dump(exclude=own, exclude_none=True)


class TrainSaeConfig(StageConfig):
    """Training of the sparse autoencoder on cached residuals, or one that is trained already."""

    architecture: Literal["topk", "batchtopk", "matryoshka", "jumprelu", "relu"] = "topk"
    """`topk`: exactly k latents a token. `batchtopk`: k on average, read later with a threshold.
    `matryoshka`: batchtopk in nested dictionaries, so that general latents come first. `jumprelu`:
    learnt thresholds, L0 held at k by a penalty. `relu`: L1 with a schedule, resampling of dead
    latents; the original plan's choice. docs/sae.md names the papers."""
    expansion: float = Field(10.0, gt=0)
    """Latents per residual dimension; the plan's is 10."""
    k: int = Field(64, gt=0)
    """Active latents a token: exactly (topk), on average over a batch (batchtopk, matryoshka), or
    what the penalty pulls towards (jumprelu); not for relu."""
    matryoshka_prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """`matryoshka` only: sizes of the nested dictionaries as shares of all latents; ends with 1."""
    threshold_decay: float = Field(0.99, ge=0, lt=1)
    """`batchtopk` and `matryoshka`: the threshold for inference is a running mean of each batch's
    smallest chosen pre-activation, with this decay."""
    l0_coefficient: float = Field(1.0, ge=0)
    """`jumprelu` only: weight of (L0 / k - 1)^2."""
    threshold_init: float | None = Field(None, gt=0)
    """`jumprelu` only: every threshold at the start, for inputs of unit mean squared norm (the
    paper's is 0.001); null starts each latent's where it fires on its share of the first batch,
    so that L0 starts at k instead of falling to it over many thousand steps."""
    bandwidth: float = Field(0.001, gt=0)
    """`jumprelu` only: window around a threshold from which it learns, for such inputs."""
    source: Literal["cache", "stream"] = "cache"
    """`cache` reads the train split of `cache_activations`; `stream` runs the frozen model up to
    the hook layer over `stream_tokens` as training goes on, for budgets that no disk holds."""
    stream_tokens: int | None = Field(None, gt=0)
    """`stream` only: tokens of `ingest`'s train split; null takes all of them."""
    processes: PositiveInt = free(1)
    """Processes that share every batch, each on a device of its own (or all on the CPU): on this
    machine, or with `executor.type: ray` on the cluster's. Results of one and of several agree to
    rounding. With `source: stream` they share the frozen model's work, too. Where one is lost, all
    go on from the last checkpoint, `executor.retries` times without a new one in between."""
    window_bytes: int = Field(1 << 29, gt=0)
    """Rows that are shuffled together occupy at most this much memory."""
    budget_tokens: int = Field(1_000_000, gt=0)
    """Token visits: the activations are read again, reshuffled, until they are used up."""
    batch_tokens: int = Field(2048, gt=0)
    """Tokens per optimiser step."""
    init_tokens: int = Field(16_384, gt=1)
    """Training tokens from which the mean (the start of b_dec) and the input scale come."""
    lr: float = Field(4.5e-3, gt=0)
    """Adam's learning rate, on inputs scaled to unit variance per dimension."""
    lr_final: float = Field(4.5e-4, gt=0)
    """The rate at the last step."""
    lr_reference_latents: int | None = Field(None, gt=0)
    """Both rates are multiplied by sqrt(this / number of latents): larger dictionaries want smaller
    steps (Gao et al. 2024, appendix A; sparsify's reference is 2^14). Null: as they are given."""
    warmup_steps: int = Field(50, ge=0)
    """Steps over which the rate rises linearly from 0."""
    decay_from: float = Field(0.6, ge=0, le=1)
    """Share of training after which the rate falls linearly to `lr_final`."""
    adam_beta1: float = Field(0.7, ge=0, lt=1)
    """Adam's first decay. Rows of latents that fire rarely get few gradients, for which the usual
    0.9 is slow; much less forgets too soon."""
    encoder_init: float = Field(0.3, gt=0)
    """Norm of the encoder's rows at the start (the decoder's have 1). At 1 the first
    reconstructions are larger than the inputs, and undoing that takes many steps."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    matmul_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the encoder's product that picks the active latents (topk takes the activations from it,
    too); other values and gradients are float32.
    A CPU that is not faster with bfloat16 takes float32."""
    dead_after_tokens: int = Field(100_000, gt=0)
    """A latent that has not fired for so many training tokens counts as dead."""
    auxk_coefficient: float = Field(1 / 32, ge=0)
    """topk, batchtopk, matryoshka: weight of the AuxK loss, which revives dead latents."""
    auxk: int | None = Field(None, gt=0)
    """topk, batchtopk, matryoshka: dead latents a token that reconstruct the error in that loss;
    null takes half of d_model."""
    sparsity_warmup_steps: int = Field(1000, ge=0)
    """`relu` and `jumprelu`: steps over which the sparsity coefficient rises linearly from 0."""
    sparsity_phases: tuple[SparsityPhase, ...] = (
        SparsityPhase(steps=10_000, coefficient=0.001),
        SparsityPhase(steps=30_000, coefficient=0.01),
        SparsityPhase(steps=10_000, coefficient=0.001),
    )
    """`relu` only: sparsity coefficients in turn; the last one stays."""
    resample_every_steps: int = Field(1000, gt=0)
    """`relu` and `jumprelu`: how often dead latents are given a new direction (and threshold)."""
    retrain: Retraining | None = free(None)
    """Start from a published SAE of the same architecture and sizes. Its content and the flagged
    latents, not their places, are part of the stage's fingerprint."""
    pretrained: PretrainedSae | None = free(None)
    """Take this SAE instead of training one: of the other settings here only `eval_tokens` is
    read then. Its content is part of the stage's fingerprint."""
    eval_every_steps: int = Field(50, gt=0)
    """Steps between evaluations on the validation split; the best fvu is the one published."""
    eval_tokens: int = Field(8192, gt=1)
    """Validation tokens of each evaluation."""
    checkpoint_every_steps: int = free(100, gt=0)
    """Steps between checkpoints, for resume; the plan's is 5,000."""
    log_every_steps: int = Field(10, gt=0)
    """Steps between points of the training curves."""
    alert_dead_fraction: float = free(0.2, ge=0, le=1)
    """An alert is raised when a larger share of latents is dead."""
    alert_l0: Band = free((5.0, 500.0))
    """An alert is raised when the mean L0 leaves this band after warm-up."""

    @property
    def num_devices(self) -> int:
        """One a process."""
        return self.processes if self.in_team else 1

    @property
    def in_team(self) -> bool:
        """Whether something is trained, in several processes."""
        return self.pretrained is None and self.processes > 1

    def digest_fields(self) -> dict[str, Any]:
        """Where nothing is trained, no setting of training counts."""
        if self.pretrained is None:
            return super().digest_fields()
        return {"eval_tokens": self.eval_tokens, "pretrained": self.pretrained.digest_fields()}

    @model_validator(mode="after")
    def _check(self) -> TrainSaeConfig:
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final {self.lr_final} is above lr {self.lr}")
        if self.batch_tokens % self.processes:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is no multiple of processes {self.processes}: "
                "each takes an equal part of every batch"
            )
        if self.architecture == "relu" and not self.sparsity_phases:
            raise ValueError("relu needs at least one entry in sparsity_phases")
        prefixes = self.matryoshka_prefixes
        if list(prefixes) != sorted(set(prefixes)) or prefixes[:1] <= (0,) or prefixes[-1:] != (1,):
            raise ValueError("matryoshka_prefixes must rise from above 0 to 1")
        if self.pretrained is not None and self.retrain is not None:
            raise ValueError(
                "pretrained takes an SAE as it is, retrain trains one on; give one of them"
            )
        return self


class SweepSaeConfig(StageConfig):
    """Small SAEs over layers, k and expansion, to choose the hook layer by."""

    layers: tuple[PositiveInt, ...] = ()
    """Layers compared; none: no sweep."""
    ks: tuple[PositiveInt, ...] = Field((64,), min_length=1)
    """Active latents a token."""
    expansions: tuple[PositiveFloat, ...] = Field((10.0,), min_length=1)
    """Latents per residual dimension."""
    train_tokens: PositiveInt = 50_000
    """Tokens of `train` that every SAE and every affine decoder is fitted on, held in memory."""
    test_tokens: PositiveInt = 8_192
    """Tokens of `test` that everything is measured on."""
    splice_sequences: PositiveInt = 8
    """Test sequences for the splice KL."""
    training: TrainSaeConfig = TrainSaeConfig(budget_tokens=400_000)
    """How each SAE is trained; its `k`, `expansion`, `source` and `processes` are not
    read."""
    max_decoder_kl: PositiveFloat = 1.5
    """Nats per token; the plan's gate for a supervised decoder."""
    max_splice_kl: PositiveFloat = 0.5
    """Nats per token; the plan's gate for an SAE."""
    micro_batch_sequences: PositiveInt = free(8)
    """Sequences per forward pass."""

    @model_validator(mode="after")
    def _a_sweep_trains(self) -> SweepSaeConfig:
        if self.training.pretrained is not None:
            raise ValueError(
                "training.pretrained: a sweep trains its SAEs; it belongs to train_sae"
            )
        return self


class GateSaeConfig(StageConfig):
    """The SAE's quality gate: what is measured on the test split, and what must be reached."""

    max_normalised_mse: float = Field(0.01, gt=0)
    """Squared error over squared norm; the plan's target is 0.01."""
    min_explained_variance: float = Field(0.95, le=1)
    """1 - fvu; the plan's target is 0.95."""
    max_splice_kl: float = Field(0.5, gt=0)
    """Nats per token between the frozen model and the spliced one; the plan's target is 0.5."""
    l0_range: Band = (50.0, 100.0)
    """Mean active latents a token; the plan's target is 50 to 100."""
    max_dead_fraction: float = Field(0.05, ge=0, le=1)
    """Share of latents that never fire on the test tokens; the plan's target is 0.05."""
    max_near_duplicate_fraction: float = Field(0.05, ge=0, le=1)
    """Share of latents whose decoder row has a twin; the plan's target is 0.05."""
    eval_tokens: int = Field(50_000, gt=1)
    """Test tokens for reconstruction and density; fewer if the cache holds fewer."""
    batch_tokens: int = free(4096, gt=0)
    """Tokens encoded at once."""
    splice_sequences: int = Field(16, gt=0)
    """Test sequences for the splice metrics."""
    random_control: bool = True
    """Measure a random-init SAE of the same L0 as well."""
    on_fail: OnFail = free("stop")
    """`stop` ends the run when the gate fails; `warn` goes on and marks all that follows."""

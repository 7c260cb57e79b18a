"""The architectures on one page: a class each, with what fires, what keeps it few and alive.

- topk: the k largest of each token (Gao et al. 2024, arXiv 2406.04093)
- batchtopk: the N k largest of the batch (Bussmann et al. 2024, arXiv 2412.06410)
- matryoshka: the same, in nested dictionaries (Bussmann et al. 2025, arXiv 2503.17547)
- jumprelu: above a learnt threshold, L0 held by a penalty (Rajamanoharan et al. 2024, arXiv
  2407.14435)
- relu: above zero, kept few by an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity")
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rldecoder.config.sae import TrainSaeConfig
from rldecoder.precision import fast_dtype
from rldecoder.sae.autoencode import Autoencoded, Fires, JumpGate, relu_gates
from rldecoder.sae.candidates import (
    FLOOR_MARGIN,
    Chosen,
    batch_top_k_pairs,
    pairs_above,
    top_k_pairs,
)
from rldecoder.sae.losses import auxk_loss, l0_loss, l1_loss
from rldecoder.sae.model import Sae
from rldecoder.sae.parallel import Group
from rldecoder.sae.schedule import sparsity_coefficient
from rldecoder.sae.sparse_ops import SaeWeights
from rldecoder.sae.spec import SaeSpec

DENSE_ABOVE = 0.05
"""Share of candidate pairs from which dense products are the faster way (measured on 2 cores)."""

FIRST_TOKENS = 2048
"""Tokens of a batch from which jumprelu's thresholds start."""


class Step(NamedTuple):
    """What a penalty sees beside the output."""

    number: int
    """Of the optimiser step, from 0."""
    x: Tensor
    """[N, D] scaled inputs, this process's."""
    weights: SaeWeights
    dead: Tensor
    """[n] int64: latents that have not fired for long."""
    group: Group


class Thresholds(NamedTuple):
    """What an architecture learns beside the weights, for checkpoints."""

    log_each: Tensor | None = None
    """[L], logarithms of jumprelu's."""
    of_batches: float | None = None
    """batchtopk, matryoshka: the running mean."""


class Architecture(Fires, ABC):
    """An SAE architecture in training. Thresholds are its own; weights belong to the trainer.

    Inputs are scaled: their mean squared norm is d_model. The methods that do nothing here are
    for architectures with thresholds.
    """

    read_as: ClassVar[Literal["topk", "relu", "jumprelu"]]
    """How the published SAE is read, one token at a time."""
    aims_at_k: ClassVar[bool] = True
    """Whether `k` says how many latents are to fire."""
    resamples: ClassVar[bool] = False
    """Whether dead latents are given new directions now and then."""

    def __init__(
        self, config: TrainSaeConfig, spec: SaeSpec, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.spec = config, spec
        self.matmul_dtype = fast_dtype(config.matmul_dtype, device)

    @classmethod
    def settling_steps(cls, config: TrainSaeConfig) -> int:
        """Steps after which L0 means something."""
        return config.warmup_steps

    @property
    def ends(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries, ascending; the last one is L."""
        return (self.spec.num_latents,)

    def activate(
        self, pre_acts: Float[Tensor, " *cells"], latents: Int[Tensor, " *cells"] | None
    ) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
        """See `Fires.activate`."""
        return relu_gates(pre_acts)

    @abstractmethod
    def penalty(self, out: Autoencoded, step: Step) -> tuple[Float[Tensor, ""], float]:
        """What is added to the reconstruction loss, with its coefficient."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What Adam moves beside the weights."""
        return []

    def begin(self, x: Float[Tensor, "tokens d_model"], weights: SaeWeights) -> None:
        """Start on the first batch [N, D] of a training from scratch."""

    def take(self, sae: Sae) -> None:
        """Start from a published SAE, brought to scaled inputs."""

    def after_step(self, out: Autoencoded, index: int, group: Group) -> None:
        """Learn from the batch of a step."""

    def restart(
        self,
        x: Float[Tensor, "tokens d_model"],
        weights: SaeWeights,
        latents: Int[Tensor, " some"],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Suit latents [n] to the new directions that they were given on a batch [N, D]."""

    def threshold(self, like: Float[Tensor, " latents"]) -> Float[Tensor, " latents"] | None:
        """[L], above which latents of the published SAE fire; `like` has its type and place."""
        return None

    def pack(self) -> Thresholds:
        """Its state for a checkpoint."""
        return Thresholds()

    def unpack(self, kept: Thresholds) -> None:
        """The inverse of `pack`, in place."""


class _Revived(Architecture):
    """Dead latents learn to explain what the living ones leave over (AuxK)."""

    def penalty(self, out: Autoencoded, step: Step) -> tuple[Tensor, float]:
        """The AuxK loss."""
        config = self.config
        if not len(step.dead) or not config.auxk_coefficient:
            return step.x.new_zeros(()), 0.0
        error = step.x - out.levels[:, -1]
        auxk = config.auxk or max(1, self.spec.d_model // 2)
        loss = auxk_loss(
            step.x, error, step.weights, step.dead, auxk, self.matmul_dtype, step.group.mean
        )
        return loss, config.auxk_coefficient


class TopK(_Revived):
    """Exactly k latents a token."""

    read_as = "topk"

    def choose(
        self, x: Float[Tensor, "tokens d_model"], weights: SaeWeights, group: Group
    ) -> Chosen:
        """The k largest of each token."""
        return top_k_pairs(x, weights, self.config.k, self.matmul_dtype)


class BatchTopK(_Revived):
    """k latents a token on average; what a batch decides here, a threshold decides for one token.

    The threshold is a running mean of each batch's smallest chosen pre-activation.
    """

    read_as = "jumprelu"

    def __init__(
        self, config: TrainSaeConfig, spec: SaeSpec, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(config, spec, device)
        self.batch_threshold: float | None = None
        self.floor = math.inf

    def choose(
        self, x: Float[Tensor, "tokens d_model"], weights: SaeWeights, group: Group
    ) -> Chosen:
        """The N k largest of the batch."""
        return batch_top_k_pairs(x, weights, self.config.k, self.matmul_dtype, self.floor, group)

    def take(self, sae: Sae) -> None:
        """Its thresholds are equal: their mean is one of them."""
        self.batch_threshold = float(sae.threshold.mean())

    @torch.no_grad()
    def after_step(self, out: Autoencoded, index: int, group: Group) -> None:
        """Move the threshold, and say where the next batch's candidates begin."""
        cut = float(group.mean(torch.tensor(out.cut, device=out.levels.device)))
        before = cut if self.batch_threshold is None else self.batch_threshold
        # A mean over few batches at first: the cuts of the first ones lie far from the rest.
        decay = min(self.config.threshold_decay, (1 + index) / (10 + index))
        self.batch_threshold = decay * before + (1 - decay) * cut
        self.floor = (1 - FLOOR_MARGIN) * cut

    def threshold(self, like: Float[Tensor, " latents"]) -> Float[Tensor, " latents"]:
        """The same for all latents."""
        return torch.full_like(like, self.batch_threshold or 0.0)

    def pack(self) -> Thresholds:
        """The floor is not in it: it decides nothing but the speed of one step."""
        return Thresholds(of_batches=self.batch_threshold)

    def unpack(self, kept: Thresholds) -> None:
        """The inverse of `pack`, in place."""
        self.batch_threshold = kept.of_batches


class Matryoshka(BatchTopK):
    """Nested dictionaries, so that general latents come first."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The config's shares of all latents."""
        num_latents = self.spec.num_latents
        sizes = {max(1, round(share * num_latents)) for share in self.config.matryoshka_prefixes}
        return tuple(sorted(sizes))


class JumpRelu(Architecture):
    """Each latent fires above its own threshold, which is learnt; L0 is held at k."""

    read_as = "jumprelu"
    resamples = True

    def __init__(
        self, config: TrainSaeConfig, spec: SaeSpec, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(config, spec, device)
        # Scaled inputs have a mean squared norm of d_model, the config's have 1.
        self.bandwidth = config.bandwidth * math.sqrt(spec.d_model)
        first = math.log((config.threshold_init or 1.0) * math.sqrt(spec.d_model))
        self.log_threshold = nn.Parameter(torch.full((spec.num_latents,), first, device=device))

    def choose(
        self, x: Float[Tensor, "tokens d_model"], weights: SaeWeights, group: Group
    ) -> Chosen | None:
        """All that fire, and those just below, from which thresholds learn."""
        return _few_above(x, weights, self.log_threshold.exp() - self.bandwidth, self.matmul_dtype)

    def activate(
        self, pre_acts: Float[Tensor, " *cells"], latents: Int[Tensor, " *cells"] | None
    ) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
        """The pre-activations where they exceed their thresholds."""
        theta = self.log_threshold.exp()
        theta = theta.expand_as(pre_acts) if latents is None else theta[latents]
        acts, gates = JumpGate.apply(pre_acts, theta, self.bandwidth)
        return acts, gates

    def penalty(self, out: Autoencoded, step: Step) -> tuple[Float[Tensor, ""], float]:
        """(L0 / k - 1)^2 of the whole batch; this process moves its own part of it."""
        config = self.config
        risen = min(1.0, (step.number + 1) / max(1, config.sparsity_warmup_steps))
        l0 = out.gates.sum() / len(step.x)
        l0 = l0 + (step.group.mean(l0) - l0.detach())
        return l0_loss(l0, config.k), config.l0_coefficient * risen

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The thresholds."""
        return [self.log_threshold]

    def begin(self, x: Float[Tensor, "tokens d_model"], weights: SaeWeights) -> None:
        """Thresholds start where L0 is k, unless the config says where."""
        if self.config.threshold_init is None:
            self._start(x, weights, slice(None))

    @torch.no_grad()
    def take(self, sae: Sae) -> None:
        """The published thresholds."""
        self.log_threshold.copy_(sae.threshold.log())

    @torch.no_grad()
    def restart(
        self,
        x: Float[Tensor, "tokens d_model"],
        weights: SaeWeights,
        latents: Int[Tensor, " some"],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Their thresholds start anew, too, without Adam's memory of the old ones."""
        self._start(x, weights, latents)
        for moment in optimizer.state.get(self.log_threshold, {}).values():
            if moment.shape == self.log_threshold.shape:
                moment[latents] = 0.0

    @torch.no_grad()
    def _start(self, x: Tensor, weights: SaeWeights, latents: Tensor | slice) -> None:
        """Thresholds where each latent fires on k / num_latents of some tokens [N, D]."""
        x = x[:FIRST_TOKENS]
        pre_acts = F.linear(x - weights.b_dec, weights.enc[latents], weights.b_enc[latents])
        firing = max(1, round(self.config.k / self.spec.num_latents * len(x)))
        # The largest value that must not fire: a latent fires above its threshold.
        cut = pre_acts.T.contiguous().topk(min(firing + 1, len(x)), dim=1).values[:, -1]
        self.log_threshold[latents] = cut.clamp_min(1e-3).log()

    def threshold(self, like: Float[Tensor, " latents"]) -> Float[Tensor, " latents"]:
        """Each latent's own."""
        return self.log_threshold.detach().exp()

    def pack(self) -> Thresholds:
        """Each latent's own."""
        return Thresholds(log_each=self.log_threshold)

    @torch.no_grad()
    def unpack(self, kept: Thresholds) -> None:
        """The inverse of `pack`, in place."""
        assert kept.log_each is not None
        self.log_threshold.copy_(kept.log_each)


class Relu(Architecture):
    """All positive pre-activations fire; an L1 penalty keeps them few."""

    read_as = "relu"
    aims_at_k = False
    resamples = True

    @classmethod
    def settling_steps(cls, config: TrainSaeConfig) -> int:
        """L1 needs its full weight and time to act."""
        return max(config.warmup_steps, 2 * config.sparsity_warmup_steps)

    def choose(
        self, x: Float[Tensor, "tokens d_model"], weights: SaeWeights, group: Group
    ) -> Chosen | None:
        """All that fire."""
        return _few_above(x, weights, torch.zeros_like(weights.b_enc), self.matmul_dtype)

    def penalty(self, out: Autoencoded, step: Step) -> tuple[Float[Tensor, ""], float]:
        """L1, with the coefficient of the phase."""
        config = self.config
        coefficient = sparsity_coefficient(
            config.sparsity_phases, config.sparsity_warmup_steps, step.number
        )
        return l1_loss(out.acts, len(step.x)), coefficient


ARCHITECTURES: dict[str, type[Architecture]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpRelu,
    "relu": Relu,
}
"""By their names in the config."""


def _few_above(x: Tensor, weights: SaeWeights, floor: Tensor, dtype: torch.dtype) -> Chosen | None:
    """Pairs above a floor for each latent [L]; None when they are too many to be sparse."""
    pairs = pairs_above(x, weights, floor, dtype, DENSE_ABOVE * len(x) * len(weights.enc))
    return None if pairs is None else Chosen(pairs)

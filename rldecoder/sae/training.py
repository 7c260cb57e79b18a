"""One SAE training step in one view, with all the state that an exact resume needs.

The trainer knows no files and no stage: give it [N, D] tensors from anywhere. Inputs are shifted
and scaled so that a dimension has unit variance on average; the scale is folded into the weights
of the SAE that comes out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rldecoder.checkpoints import pack_optimizer, unpack_optimizer
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.errors import BadInputError, NumericalError
from rldecoder.sae.losses import auxk_loss, l1_loss, reconstruction_loss
from rldecoder.sae.metrics import reconstruction_quality
from rldecoder.sae.model import Sae, SaeSpec, fold_input_scale
from rldecoder.sae.resampling import resample_dead
from rldecoder.sae.schedule import learning_rate, sparsity_coefficient
from rldecoder.sae.sparse_ops import SaeWeights, autoencode
from rldecoder.seeds import torch_generator


class InputStatistics(NamedTuple):
    """What training knows of its inputs beforehand."""

    mean: Tensor
    """[D] float32."""
    scale: float
    """Factor that brings the mean squared norm of centred inputs to D."""


def input_statistics(x: Tensor) -> InputStatistics:
    """Mean and scale of a sample [N, D].

    Raises:
        NumericalError: the sample holds NaN or infinity.
        BadInputError: all rows are equal.
    """
    x = x.float()
    if not bool(torch.isfinite(x).all()):
        raise NumericalError(
            "The cached activations hold NaN or infinity.",
            "The language model overflowed, or the cache is damaged.",
            "Delete the cache_activations artifact and run again.",
        )
    mean = x.mean(0)
    square = float((x - mean).square().sum(1).mean())
    if square <= 0:
        raise BadInputError(
            "All cached activations are equal.",
            "An SAE cannot be trained on a constant.",
            "Check the corpus and `cache_activations.hook_layer`.",
        )
    return InputStatistics(mean, math.sqrt(x.shape[1] / square))


class StepResult(NamedTuple):
    """Numbers of one training step, for curves and alerts."""

    loss: float
    mse: float
    """Mean squared error per element of scaled inputs; an estimate of fvu."""
    l0: float
    """Mean number of active latents a token."""
    dead_fraction: float
    grad_norm: float
    """Before clipping."""
    lr: float
    penalty: float
    """AuxK or L1 loss, before its coefficient."""
    revived: float
    """Latents resampled at this step."""


class SaeTrainer:
    """Weights, optimiser and counters of an SAE in training."""

    def __init__(
        self,
        spec: SaeSpec,
        config: TrainSaeConfig,
        num_steps: int,
        statistics: InputStatistics,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec, self.config, self.num_steps, self.seed = spec, config, num_steps, seed
        self.scale = statistics.scale
        start = Sae.random_init(spec, seed, statistics.mean * statistics.scale).to(device)
        self.weights = SaeWeights(
            enc=nn.Parameter(start.W_enc.detach().T.contiguous()),
            b_enc=nn.Parameter(start.b_enc.detach().clone()),
            dec=nn.Parameter(start.W_dec.detach().clone()),
            b_dec=nn.Parameter(start.b_dec.detach().clone()),
        )
        # Mean squared errors make gradients small beside Adam's default eps (Gao et al. 2024).
        self.optimizer = torch.optim.Adam(self.weights, lr=config.lr, eps=6.25e-10, fused=True)
        self.matmul_dtype = getattr(torch, config.matmul_dtype)
        self.auxk = config.auxk or max(1, spec.d_model // 2)
        self.step_index = 0
        self.tokens_since_fired = torch.zeros(spec.num_latents, dtype=torch.int64, device=device)
        self.best: dict[str, Tensor] = {}
        self.best_fvu, self.best_step = math.inf, -1

    def step(self, raw: Tensor) -> StepResult:
        """Train on one batch of raw residuals [N, D].

        Raises:
            NumericalError: the loss or the gradient is NaN or infinite.
        """
        config, weights, index = self.config, self.weights, self.step_index
        x = raw.to(weights.dec.device).float() * self.scale

        # Forward: reconstruction, and what keeps latents few (relu) or alive (topk).
        recon, pairs = autoencode(x, weights, self.spec.k, self.matmul_dtype)
        mse = reconstruction_loss(recon, x)
        self._count_firing(pairs.latents[pairs.acts.detach() > 0], len(x))
        dead = (self.tokens_since_fired >= config.dead_after_tokens).nonzero().flatten()
        penalty, coefficient = mse.new_zeros(()), 0.0
        if self.spec.architecture == "relu":
            coefficient = sparsity_coefficient(
                config.sparsity_phases, config.sparsity_warmup_steps, index
            )
            penalty = l1_loss(pairs.acts, len(x))
        elif len(dead) and config.auxk_coefficient:
            coefficient = config.auxk_coefficient
            penalty = auxk_loss(x, x - recon, weights, dead, self.auxk, self.matmul_dtype)
        loss = mse + coefficient * penalty

        # Backward: decoder rows keep unit norm, so their gradient's radial part is dropped.
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._drop_radial_gradient()
        grad_norm = nn.utils.clip_grad_norm_(self.weights, config.grad_clip)
        numbers = torch.stack([loss.detach(), mse.detach(), penalty.detach(), grad_norm]).tolist()
        if not all(map(math.isfinite, numbers)):
            raise NumericalError(
                f"SAE training diverged at step {index}: loss {numbers[0]}, "
                f"gradient norm {numbers[3]}.",
                "The learning rate is too high, or the activations hold NaN.",
                "Lower `train_sae.lr`; the last checkpoint is kept.",
            )
        lr = learning_rate(config, index, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self._normalise_decoder()

        # Resampling looks at this batch only, so that it needs no state of its own.
        revived = 0
        due = (index + 1) % config.resample_every_steps == 0 and index + 1 < self.num_steps
        if self.spec.architecture == "relu" and due and len(dead):
            generator = torch_generator(self.seed, "resample", index)
            revived = resample_dead(weights, self.optimizer, dead, x, recon.detach(), generator)
            self.tokens_since_fired[dead[:revived]] = 0
        self.step_index += 1
        return StepResult(
            loss=numbers[0],
            mse=numbers[1],
            l0=float((pairs.acts > 0).sum()) / len(x),
            dead_fraction=len(dead) / self.spec.num_latents,
            grad_norm=numbers[3],
            lr=lr,
            penalty=numbers[2],
            revived=float(revived),
        )

    @property
    def dead_fraction(self) -> float:
        """Share of latents that have not fired for `dead_after_tokens` training tokens."""
        dead = self.tokens_since_fired >= self.config.dead_after_tokens
        return float(dead.double().mean())

    @torch.no_grad()
    def _count_firing(self, fired: Tensor, num_tokens: int) -> None:
        self.tokens_since_fired += num_tokens
        self.tokens_since_fired[fired] = 0

    @torch.no_grad()
    def _drop_radial_gradient(self) -> None:
        dec = self.weights.dec
        assert dec.grad is not None
        dec.grad -= (dec.grad * dec).sum(1, keepdim=True) * dec

    @torch.no_grad()
    def _normalise_decoder(self) -> None:
        dec = self.weights.dec
        dec /= dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def evaluate(self, batches: Iterable[Tensor]) -> tuple[float, float]:
        """Held-out (fvu, mean L0) on raw residuals; the weights are kept if they are the best."""
        quality = reconstruction_quality(self.sae(), batches)
        if not math.isfinite(quality.fvu):
            raise NumericalError(
                f"The held-out fvu at step {self.step_index} is {quality.fvu}.",
                "Training diverged, or the validation activations hold NaN.",
                "Lower `train_sae.lr`, or rebuild the activation cache.",
            )
        if quality.fvu < self.best_fvu:
            self.best_fvu, self.best_step = quality.fvu, self.step_index
            named = self.weights._asdict()
            self.best = {name: tensor.detach().clone() for name, tensor in named.items()}
        return quality.fvu, quality.l0_mean

    def sae(self, *, best: bool = False) -> Sae:
        """The current (or best) weights as an SAE that reads raw residuals."""
        named = self.best if best else self.weights._asdict()
        scaled = Sae(self.spec)
        state = {"W_enc": named["enc"].T, "b_enc": named["b_enc"]}
        state |= {"W_dec": named["dec"], "b_dec": named["b_dec"]}
        scaled.load_state_dict({name: tensor.detach().cpu() for name, tensor in state.items()})
        folded = fold_input_scale(scaled, self.scale)
        return folded.to(self.weights.dec.device).eval().requires_grad_(False)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON values."""
        tensors, optimizer = pack_optimizer(self.optimizer)
        tensors |= {f"weights.{name}": value for name, value in self.weights._asdict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["tokens_since_fired"] = self.tokens_since_fired
        state = {
            "optimizer": optimizer,
            "step": self.step_index,
            "scale": self.scale,
            "best_fvu": self.best_fvu if self.best else None,
            "best_step": self.best_step,
        }
        return tensors, state

    @torch.no_grad()
    def unpack(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `pack`, in place."""
        for name, parameter in self.weights._asdict().items():
            parameter.copy_(tensors[f"weights.{name}"])
        unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self.step_index, self.scale = int(state["step"]), float(state["scale"])
        self.best_step = int(state["best_step"])
        self.best_fvu = math.inf if state["best_fvu"] is None else float(state["best_fvu"])
        device = self.weights.dec.device
        self.best = {
            name: tensors[f"best.{name}"].to(device)
            for name in self.weights._fields
            if f"best.{name}" in tensors
        }

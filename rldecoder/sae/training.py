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
from jaxtyping import Float, Int
from torch import Tensor, nn

from rldecoder.config.sae import TrainSaeConfig
from rldecoder.errors import BadInputError, NumericalError
from rldecoder.optimizer_state import pack_optimizer, unpack_optimizer
from rldecoder.sae.architectures import ARCHITECTURES, Step, Thresholds
from rldecoder.sae.autoencode import autoencode
from rldecoder.sae.losses import reconstruction_loss
from rldecoder.sae.metrics import reconstruction_quality
from rldecoder.sae.model import Sae, SaeSpec, fold_input_scale, subtract_b_dec
from rldecoder.sae.parallel import Group
from rldecoder.sae.resampling import resample_dead
from rldecoder.sae.schedule import learning_rate, learning_rate_scale
from rldecoder.sae.sparse_ops import SaeWeights
from rldecoder.schemas import JsonRecord, Scalar
from rldecoder.seeds import torch_generator


class InputStatistics(NamedTuple):
    """What training knows of its inputs beforehand."""

    mean: Tensor
    """[D] float32."""
    scale: float
    """Factor that brings the mean squared norm of centred inputs to D."""


def input_statistics(x: Float[Tensor, "tokens d_model"]) -> InputStatistics:
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
            "Build the activation cache again.",
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
    """Mean squared error per element of scaled inputs, all latents used; an estimate of fvu."""
    l0: float
    """Mean number of active latents a token."""
    dead_fraction: float
    grad_norm: float
    """Before clipping."""
    lr: float
    penalty: float
    """AuxK, L0 or L1 loss, before its coefficient."""
    revived: float
    """Latents resampled at this step."""


class BestSae(JsonRecord):
    """The published weights: those with the least held-out fvu of a training, or pretrained ones
    (then steps, tokens and epochs are 0)."""

    split: str
    """The split that chose them."""
    fvu: float
    """Fraction of its variance left unexplained."""
    step: int
    """Optimiser step after which they were kept."""
    num_steps: int
    """Steps of the whole training."""
    tokens: int
    """Training tokens consumed, repetitions counted."""
    epochs: float
    """The same in passes over the training text."""
    dead_fraction: float
    """Share of latents that did not fire for long, at the end; of pretrained ones, that never did
    on the held-out tokens."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        return {
            "validation_fvu": self.fvu,
            "dead_fraction": self.dead_fraction,
            "best_step": self.step,
            "steps": self.num_steps,
            "tokens": self.tokens,
            "epochs": self.epochs,
        }


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
        group: Group | None = None,
    ) -> None:
        self.spec, self.config, self.num_steps, self.seed = spec, config, num_steps, seed
        self.group = group or Group()
        self.scale = statistics.scale
        start = Sae.random_init(spec, seed, statistics.mean * statistics.scale).to(device)
        self.weights = SaeWeights(
            enc=nn.Parameter(start.W_enc.detach().T.contiguous() * config.encoder_init),
            b_enc=nn.Parameter(start.b_enc.detach().clone()),
            dec=nn.Parameter(start.W_dec.detach().clone()),
            b_dec=nn.Parameter(start.b_dec.detach().clone()),
        )
        self.architecture = ARCHITECTURES[config.architecture](config, spec, device)
        # Mean squared errors make gradients small beside Adam's default eps (Gao et al. 2024).
        self.optimizer = torch.optim.Adam(
            self._trained, config.lr, (config.adam_beta1, 0.999), eps=6.25e-10, fused=True
        )
        self._lr_scale = learning_rate_scale(config, spec.num_latents)
        self.step_index = 0
        self.tokens_since_fired = torch.zeros(spec.num_latents, dtype=torch.int64, device=device)
        self.best: dict[str, Tensor] = {}
        self.best_fvu, self.best_step = math.inf, -1
        self._started, self._flagged = False, torch.empty(0, dtype=torch.int64)

    def step(self, raw: Float[Tensor, "tokens d_model"]) -> StepResult:
        """Train on one batch of raw residuals [N, D]; every process of a group is given all of it.

        Raises:
            NumericalError: the loss or the gradient is NaN or infinite.
        """
        config, weights, index, group = self.config, self.weights, self.step_index, self.group
        architecture = self.architecture
        if index == 0:
            self._begin(raw)
        x = self._scaled(group.slice(raw))

        # Forward: reconstruction, and what keeps latents few or alive.
        out = autoencode(x, weights, architecture, group)
        recon = out.levels[:, -1]
        loss = reconstruction_loss(out.levels, x)
        mse = loss if out.levels.shape[1] == 1 else reconstruction_loss(recon[:, None], x)
        self.tokens_since_fired += len(x) * group.size
        self.tokens_since_fired[group.any(out.fired)] = 0
        dead = (self.tokens_since_fired >= config.dead_after_tokens).nonzero().flatten()
        penalty, coefficient = architecture.penalty(out, Step(index, x, weights, dead, group))
        loss = loss + coefficient * penalty

        # Backward: decoder rows keep unit norm, so their gradient's radial part is dropped.
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        group.average_gradients(self._trained)
        self._drop_radial_gradient()
        grad_norm = nn.utils.clip_grad_norm_(self._trained, config.grad_clip)
        l0 = out.gates.detach().sum() / len(x)
        numbers = group.mean(torch.stack([loss, mse, penalty, grad_norm, l0])).tolist()
        if not all(map(math.isfinite, numbers)):
            raise NumericalError(
                f"SAE training diverged at step {index}: loss {numbers[0]}, "
                f"gradient norm {numbers[3]}.",
                "The learning rate is too high, or the activations hold NaN.",
                "Lower `train_sae.lr`; the last checkpoint is kept.",
            )
        lr = learning_rate(config, index, self.num_steps) * self._lr_scale
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.step()
        self._normalise_decoder()
        architecture.after_step(out, index, group)

        # Resampling looks at this batch only, so that it needs no state of its own.
        revived = 0
        due = (index + 1) % config.resample_every_steps == 0 and index + 1 < self.num_steps
        if architecture.resamples and due and len(dead):
            revived = self._resample(raw, dead)
        self.step_index += 1
        return StepResult(
            loss=numbers[0],
            mse=numbers[1],
            l0=numbers[4],
            dead_fraction=len(dead) / self.spec.num_latents,
            grad_norm=numbers[3],
            lr=lr,
            penalty=numbers[2],
            revived=float(revived),
        )

    @torch.no_grad()
    def start_from(self, sae: Sae, flagged: Int[Tensor, " some"]) -> None:
        """Take the weights of a published SAE; call it before the first step.

        Args:
            sae: of the same architecture and sizes, reading raw residuals.
            flagged: [n] int64, latents that the first step points at badly reconstructed inputs.

        Raises:
            BadInputError: it is another kind of SAE, or has no such latent.
        """
        for name in ("architecture", "d_model", "num_latents", "k", "hook_layer", "model"):
            mine, theirs = getattr(self.spec, name), getattr(sae.spec, name)
            unknown = name == "model" and not (mine and theirs)
            if mine != theirs and not unknown:
                raise BadInputError(
                    f"The SAE to go on from has {name} {theirs}, and {mine} is to be trained.",
                    "Training can only go on with an SAE of the same kind.",
                    "Correct the settings, or `train_sae.retrain.sae`.",
                )
        if len(flagged) and int(flagged.max()) >= self.spec.num_latents:
            raise BadInputError(
                f"Latent {int(flagged.max())} is flagged, and there are {self.spec.num_latents}.",
                "The flags belong to another SAE.",
                "Correct `train_sae.retrain.clusters`.",
            )
        scaled = fold_input_scale(subtract_b_dec(sae), 1 / self.scale).to(self.weights.dec.device)
        for parameter, value in zip(
            self.weights, (scaled.W_enc.T, scaled.b_enc, scaled.W_dec, scaled.b_dec), strict=True
        ):
            parameter.copy_(value)
        self.architecture.take(scaled)
        self._started = True
        self._flagged = flagged

    @property
    def dead_fraction(self) -> float:
        """Share of latents that have not fired for `dead_after_tokens` training tokens."""
        dead = self.tokens_since_fired >= self.config.dead_after_tokens
        return float(dead.double().mean())

    @property
    def _trained(self) -> list[Tensor]:
        """Everything that Adam moves."""
        return [*self.weights, *self.architecture.parameters]

    def _scaled(self, raw: Tensor) -> Tensor:
        """Raw residuals [N, D] as the SAE in training reads them."""
        return raw.to(self.weights.dec.device).float() * self.scale

    def _begin(self, raw: Tensor) -> None:
        """What the first batch [N, D] decides before the first step."""
        if not self._started:
            self.architecture.begin(self._scaled(raw), self.weights)
        if len(self._flagged):
            self._resample(raw, self._flagged.to(self.weights.dec.device))
        self.agree()

    @torch.no_grad()
    def _resample(self, raw: Tensor, dead: Tensor) -> int:
        """Revive dead latents; every process sees the whole batch, and so does the same."""
        x = self._scaled(raw)
        recon = autoencode(x, self.weights, self.architecture).levels[:, -1]
        generator = torch_generator(self.seed, "resample", self.step_index)
        revived = resample_dead(self.weights, self.optimizer, dead, x, recon, generator)
        self.tokens_since_fired[dead[:revived]] = 0
        if revived:
            self.architecture.restart(x, self.weights, dead[:revived], self.optimizer)
        self.agree()
        return revived

    def agree(self) -> None:
        """Make all processes' state the first one's, to the bit.

        Steps keep it so on machines of one kind. Resampling draws by each process's own losses,
        which sums in any order (CUDA's atomics) move; so does a processor of another kind.
        """
        moments = [m for state in self.optimizer.state.values() for m in state.values()]
        self.group.agree([*self._trained, *moments, self.tokens_since_fired])

    @torch.no_grad()
    def _drop_radial_gradient(self) -> None:
        dec = self.weights.dec
        assert dec.grad is not None
        radial = torch.linalg.vecdot(dec.grad, dec)
        dec.grad.addcmul_(dec, radial[:, None], value=-1)

    @torch.no_grad()
    def _normalise_decoder(self) -> None:
        dec = self.weights.dec
        dec /= dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def evaluate(self, batches: Iterable[Float[Tensor, "_ d_model"]]) -> tuple[float, float]:
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
            self.best = {name: value.clone() for name, value in self._state().items()}
        return quality.fvu, quality.l0_mean

    def sae(self, *, best: bool = False) -> Sae:
        """The current (or best) weights as an SAE that reads raw residuals."""
        named = self.best if best else self._state()
        scaled = Sae(self.spec)
        state = {"W_enc": named["enc"].T, "W_dec": named["dec"]}
        state |= {name: value for name, value in named.items() if name not in ("enc", "dec")}
        scaled.load_state_dict({name: tensor.cpu() for name, tensor in state.items()})
        folded = fold_input_scale(scaled, self.scale)
        return folded.to(self.weights.dec.device).eval().requires_grad_(False)

    def _state(self) -> dict[str, Tensor]:
        """The SAE's tensors in training layout and scale, thresholds included."""
        named = {name: tensor.detach() for name, tensor in self.weights._asdict().items()}
        threshold = self.architecture.threshold(named["b_enc"])
        return named if threshold is None else named | {"threshold": threshold}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a resumed run needs, as tensors and JSON values."""
        tensors, optimizer = pack_optimizer(self.optimizer)
        tensors |= {f"weights.{name}": value for name, value in self.weights._asdict().items()}
        thresholds = self.architecture.pack()
        if thresholds.log_each is not None:
            tensors["log_threshold"] = thresholds.log_each
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors["tokens_since_fired"] = self.tokens_since_fired
        state = {
            "optimizer": optimizer,
            "step": self.step_index,
            "scale": self.scale,
            "best_fvu": self.best_fvu if self.best else None,
            "best_step": self.best_step,
            "batch_threshold": thresholds.of_batches,
        }
        return tensors, state

    @torch.no_grad()
    def unpack(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of `pack`, in place."""
        for name, parameter in self.weights._asdict().items():
            parameter.copy_(tensors[f"weights.{name}"])
        self.architecture.unpack(Thresholds(tensors.get("log_threshold"), state["batch_threshold"]))
        unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self.step_index, self.scale = int(state["step"]), float(state["scale"])
        self.best_step = int(state["best_step"])
        self.best_fvu = math.inf if state["best_fvu"] is None else float(state["best_fvu"])
        device = self.weights.dec.device
        self.best = {
            name.removeprefix("best."): tensor.to(device)
            for name, tensor in tensors.items()
            if name.startswith("best.")
        }


def published_spec(
    config: TrainSaeConfig,
    d_model: int,
    *,
    hook_layer: int,
    model_name: str,
    context_length: int | None = None,
) -> SaeSpec:
    """The shape of the SAE that a config trains on residuals of width `d_model`.

    Raises:
        BadInputError: k exceeds the number of latents.
    """
    architecture = ARCHITECTURES[config.architecture]
    num_latents = max(1, round(config.expansion * d_model))
    if architecture.aims_at_k and config.k > num_latents:
        raise BadInputError(
            f"train_sae.k is {config.k}, but the SAE has {num_latents} latents.",
            f"expansion {config.expansion:g} times d_model {d_model} gives that number.",
            "Lower `train_sae.k` or raise `train_sae.expansion`.",
        )
    read_as = architecture.read_as
    return SaeSpec(
        architecture=read_as,
        d_model=d_model,
        num_latents=num_latents,
        k=config.k if read_as == "topk" else None,
        hook_layer=hook_layer,
        model_name=model_name,
        context_length=context_length,
        trained_as="" if read_as == config.architecture else config.architecture,
    )

"""The public SAE trainers that ours is measured against, each behind the same two calls.

Every adapter runs the library's own training step on batches that it is given; nothing of theirs
is rewritten. A library that is not installed is left out, and said to be.

Peers whose requirements clash with the pinned ones go into a folder of their own, with
`PYTHONPATH=peers`: `pip install --no-deps --target peers eai-sparsify==1.3.3 schedulefree
dictionary-learning==0.1.0 simple-parsing docstring-parser einops natsort`, and an `nnsight.py` with
empty classes `LanguageModel` and `Envoy`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rldecoder.config.sae import TrainSaeConfig
from rldecoder.precision import has_bfloat16
from rldecoder.sae.model import SaeSpec
from rldecoder.sae.training import SaeTrainer, input_statistics


@dataclass(frozen=True)
class Problem:
    """What all are asked to do."""

    d_model: int
    num_latents: int
    k: int
    batch_tokens: int
    num_steps: int
    sample: Tensor
    """[N, D] training inputs, for those that start from statistics."""
    lr: float | None = None
    """None takes each trainer's own default."""
    mean_start: bool = True
    """Whether b_dec starts at the data's mean, where the library leaves it at zero."""
    device: str = "cpu"


class Contender(Protocol):
    """A training run."""

    def step(self, x: Tensor) -> None:
        """Train on a batch [N, D]."""
        ...

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Held-out inputs [N, D]: their reconstruction [N, D] and the number of active latents."""
        ...

    def directions(self) -> Tensor:
        """The decoder's rows [L, D]."""
        ...


class Ours:
    """rldecoder's trainer."""

    def __init__(self, problem: Problem, architecture: str, matmul_dtype: str) -> None:
        by_batch = architecture in ("batchtopk", "matryoshka")
        lr = problem.lr or TrainSaeConfig().lr
        config = TrainSaeConfig.model_validate(
            {
                "architecture": architecture,
                "k": problem.k,
                "batch_tokens": problem.batch_tokens,
                "matmul_dtype": matmul_dtype,
                "lr": lr,
                "lr_final": lr / 10,
                "warmup_steps": min(50, problem.num_steps // 10),
            }
        )
        spec = SaeSpec(
            architecture="jumprelu" if by_batch else architecture,  # type: ignore[arg-type]
            d_model=problem.d_model,
            num_latents=problem.num_latents,
            k=problem.k if architecture == "topk" else None,
        )
        statistics = input_statistics(problem.sample)
        self.trainer = SaeTrainer(
            spec, config, problem.num_steps, statistics, seed=0, device=problem.device
        )

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.trainer.sae()(x)
        return out.recon, (out.latents.acts > 0).sum(1)

    def directions(self) -> Tensor:
        return self.trainer.weights.dec.detach()


class SaeLens:
    """sae_lens's SAETrainer, its defaults but for what `problem` fixes."""

    def __init__(self, problem: Problem, architecture: str, autocast: bool = False) -> None:
        from sae_lens import (
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            TopKTrainingSAE,
            TopKTrainingSAEConfig,
        )
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        shape: dict[str, Any] = {
            "d_in": problem.d_model, "d_sae": problem.num_latents, "k": problem.k,
            "dtype": "float32", "device": problem.device,
        }  # fmt: skip
        if architecture == "topk":
            # Its sparse activations raise on a CPU (torch has no kernel for them there).
            shape["use_sparse_activations"] = problem.device != "cpu"
            sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**shape))
        else:
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape))
        if problem.mean_start:
            sae.b_dec.data.copy_(problem.sample.mean(0))
        lr = problem.lr or 3e-4
        config = SAETrainerConfig(
            total_training_samples=problem.num_steps * problem.batch_tokens,
            train_batch_size_samples=problem.batch_tokens,
            lr=lr, lr_end=lr / 10, autocast=autocast, device=problem.device,
            lr_warm_up_steps=min(50, problem.num_steps // 10),
            lr_decay_steps=problem.num_steps * 2 // 5,
        )  # fmt: skip
        nothing: Iterator[Tensor] = iter(())
        self.sae = sae
        self.trainer = SAETrainer(
            sae=sae, data_provider=nothing, evaluator=None, save_checkpoint_fn=None, cfg=config
        )

    def step(self, x: Tensor) -> None:
        self.trainer._train_step(self.sae, x)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.sae.encode(x)
        return self.sae.decode(acts), (acts > 0).sum(1)

    def directions(self) -> Tensor:
        return self.sae.W_dec.detach()

    def save(self, folder: Path, scale: float, hook_name: str) -> None:
        """Write sae_lens's folder, for inputs that were scaled by `scale` here. Ends training."""
        self.sae.fold_activation_norm_scaling_factor(scale)
        self.sae.cfg.metadata.hook_name = hook_name
        self.sae.save_inference_model(folder)


class Sparsify:
    """eai-sparsify's coder, stepped as its trainer does (SignSGD by default, or Adam)."""

    def __init__(self, problem: Problem, optimizer: str = "signum") -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
        from transformers import get_linear_schedule_with_warmup

        config = SparseCoderConfig(num_latents=problem.num_latents, k=problem.k)
        self.coder = SparseCoder(problem.d_model, config, device=problem.device)
        if problem.mean_start:
            self.coder.b_dec.data.copy_(problem.sample.mean(0))
        parameters, scale = list(self.coder.parameters()), problem.num_latents / 2**14
        self.schedule: Any = None
        if optimizer == "adam":
            self.optimizer: Any = torch.optim.Adam(
                parameters, lr=problem.lr or 2e-4 / scale**0.5, fused=True
            )
            # Its own schedule; the warm-up is as short as everyone's here.
            self.schedule = get_linear_schedule_with_warmup(
                self.optimizer, min(50, problem.num_steps // 10), problem.num_steps
            )
        else:
            inner = SignSGD(parameters, lr=problem.lr or 5e-3 / scale**0.5)
            self.optimizer = ScheduleFreeWrapper(inner, momentum=0.95)
            self.optimizer.train()
        self.alone = torch.zeros(problem.num_latents, device=problem.device)
        self.batch_tokens = problem.batch_tokens

    def step(self, x: Tensor) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        out = self.coder(x, dead_mask=self.alone > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self.alone += self.batch_tokens
        self.alone[out.latent_indices.flatten()] = 0

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        evaluate = getattr(self.optimizer, "eval", lambda: None)
        evaluate()
        out = self.coder(x)
        getattr(self.optimizer, "train", lambda: None)()
        return out.sae_out, (out.latent_acts > 0).sum(1)

    def directions(self) -> Tensor:
        return self.coder.W_dec.detach()

    def save(self, folder: Path, scale: float, hook_name: str) -> None:
        """Write sparsify's folder, for inputs that were scaled by `scale` here. Ends training.

        Its form has no hook point: the folder's name (`layers.23`) says it.
        """
        with torch.no_grad():
            # TopK is homogeneous: biases and activations shrink, the unit rows stay.
            self.coder.encoder.bias /= scale
            self.coder.b_dec /= scale
        self.coder.save_to_disk(folder)


class DictionaryLearning:
    """dictionary_learning's trainers (b_dec starts at the geometric median by itself)."""

    def __init__(self, problem: Problem, architecture: str) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = TopKTrainer if architecture == "topk" else BatchTopKTrainer
        warmup = min(50, problem.num_steps // 10)
        self.trainer = trainer(
            steps=problem.num_steps, activation_dim=problem.d_model,
            dict_size=problem.num_latents, k=problem.k, layer=0, lm_name="", lr=problem.lr,
            warmup_steps=warmup, decay_start=max(warmup + 1, int(0.6 * problem.num_steps)),
            seed=0, device=problem.device,
        )  # fmt: skip
        self.index = 0

    def step(self, x: Tensor) -> None:
        self.trainer.update(self.index, x)
        self.index += 1

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.trainer.ae.encode(x)
        return self.trainer.ae.decode(acts), (acts > 0).sum(1)

    def directions(self) -> Tensor:
        return self.trainer.ae.decoder.weight.detach().T


Make = Callable[[Problem], Contender]


def contenders(architecture: str, device: str) -> dict[str, Make]:
    """Trainers of an architecture that can be run here, by name; peers for topk and batchtopk."""
    found: dict[str, Make] = {
        "rldecoder float32": lambda problem: Ours(problem, architecture, "float32")
    }
    if has_bfloat16(device):
        found["rldecoder bfloat16"] = lambda problem: Ours(problem, architecture, "bfloat16")
    else:
        print("left out: rldecoder bfloat16 (this CPU is faster with float32, which it would take)")
    if architecture not in ("topk", "batchtopk"):
        return found  # the peers' own relu and jumprelu train to other goals
    if _installed("sae_lens"):
        found["sae_lens float32"] = lambda problem: SaeLens(problem, architecture)
        found["sae_lens autocast"] = lambda problem: SaeLens(problem, architecture, autocast=True)
    if _installed("sparsify") and architecture == "topk":
        found["sparsify signum"] = lambda problem: Sparsify(problem)
        found["sparsify adam"] = lambda problem: Sparsify(problem, "adam")
    if _installed("dictionary_learning.trainers.top_k"):
        found["dictionary_learning"] = lambda problem: DictionaryLearning(problem, architecture)
    return found


def _installed(module: str) -> bool:
    """Whether a peer can be imported; says so when it cannot."""
    warnings.filterwarnings("ignore", module=module.partition(".")[0])
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"left out: {module} ({error})")
        return False
    return True

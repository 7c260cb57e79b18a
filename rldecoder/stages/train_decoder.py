"""Supervised decoder: from the affine lens, distil the frozen model's logits into SAE latents.

Publishes `decoder/` (save_pretrained, the best epoch by validation KL; epoch 0 is the start
without training), `affine_lens.safetensors` (the lens it started from), `epochs.parquet` and
`curves.parquet`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from rldecoder.checkpoints import Checkpoints, pack_optimizer, unpack_optimizer
from rldecoder.config.decoder import TrainDecoderConfig
from rldecoder.curves import Curves
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.decoder.distill import NextTokens, TokenLosses, chunked_kl_ce, matmul_precision
from rldecoder.decoder.faithfulness import evaluate_faithfulness
from rldecoder.decoder.loading import decoder_from_lens, read_affine_lens, save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import NumericalError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.schemas import write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

EPOCHS_SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("split", pa.string()),
        ("kl", pa.float64()),
        ("kl_low", pa.float64()),
        ("kl_high", pa.float64()),
        ("ce", pa.float64()),
        ("frozen_ce", pa.float64()),
        ("accuracy", pa.float64()),
        ("frozen_accuracy", pa.float64()),
        ("agreement", pa.float64()),
        ("ece", pa.float64()),
        ("num_tokens", pa.int64()),
        ("num_labels", pa.int64()),
        ("num_sequences", pa.int64()),
    ]
)
"""Faithfulness after each epoch (0: before training). KL and CE in nats, the rest shares."""


@dataclass
class Progress:
    """What a checkpoint holds beside the weights."""

    step: int = 0
    """Optimiser steps done."""
    best_epoch: int = 0
    best_kl: float = math.inf
    epochs: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `epochs.parquet` so far."""
    curves: Curves = field(default_factory=Curves)

    def state(self) -> dict[str, Any]:
        """JSON form for a checkpoint (the first evaluation precedes every checkpoint)."""
        return {
            "best_epoch": self.best_epoch,
            "best_kl": self.best_kl,
            "epochs": self.epochs,
            "curves": self.curves.state(),
        }

    @classmethod
    def restore(cls, step: int, state: Mapping[str, Any]) -> Progress:
        """The inverse of `state`."""
        return cls(
            step,
            state["best_epoch"],
            state["best_kl"],
            state["epochs"],
            Curves.from_state(state["curves"]),
        )


def run(
    inputs: Mapping[str, InputArtifact], config: TrainDecoderConfig, ctx: StageContext
) -> StageOutput:
    """Train the decoder; see the module's docstring for what is published."""
    seed_everything(ctx.seed)
    cache = inputs["cache_activations"].path
    readers = {name: ActivationReader(cache, name) for name in ("train", "validation", "ood")}
    sae = Sae.load(inputs["train_sae"].path / "sae", device=ctx.device)
    lens_path = inputs["baselines"].path / "affine_lens.safetensors"
    lens = read_affine_lens(lens_path, sae.spec.hook_layer)
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    decoder = decoder_from_lens(lm, sae, lens)

    trainer = _Trainer(decoder, readers, config, ctx)
    trainer.fit()

    save_decoder(decoder, ctx.out / "decoder")
    save_file({"A": lens.A, "c": lens.c}, ctx.out / "affine_lens.safetensors")
    rows = trainer.progress.epochs
    write_parquet(
        ctx.out / "epochs.parquet",
        {name: [row[name] for row in rows] for name in EPOCHS_SCHEMA.names},
        EPOCHS_SCHEMA,
    )
    trainer.progress.curves.write(ctx.out / "curves.parquet")
    return StageOutput(metrics=_headline(trainer))


class _Trainer:
    """The training loop and everything it needs to stop and go on again."""

    def __init__(
        self,
        decoder: SaeDecoderForCausalLM,
        readers: Mapping[str, ActivationReader],
        config: TrainDecoderConfig,
        ctx: StageContext,
    ) -> None:
        self.decoder, self.readers, self.config, self.ctx = decoder, readers, config, ctx
        self.next_tokens = NextTokens(readers["train"])
        self.steps_per_epoch = steps_per_epoch(readers["train"].num_tokens, config)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [decoder.W], "weight_decay": config.weight_decay},
                {"params": [decoder.b], "weight_decay": 0.0},
            ],
            lr=config.lr,
        )
        self.checkpoints = Checkpoints(ctx.progress)
        self.progress = Progress()
        self.best = self._copy_of_weights()
        self.tokens_per_second = 0.0

    def fit(self) -> None:
        """Train from the last checkpoint, or from the start, and leave the best weights."""
        if not self._resume():
            self._end_epoch(0)
        config, started, first_step = self.config, time.monotonic(), self.progress.step
        with self.ctx.report.track(
            "train decoder",
            self.total_steps * config.batch_tokens,
            unit="tok",
            done=first_step * config.batch_tokens,
        ) as bar:
            while self.progress.step < self.total_steps:
                epoch, start_batch = divmod(self.progress.step, self.steps_per_epoch)
                batches = self.readers["train"].shuffled(
                    config.batch_tokens,
                    seed=derive_seed(self.ctx.seed, "batches"),
                    epoch=epoch,
                    start_batch=start_batch,
                    columns=("resid", "final_hidden"),
                )
                for batch in itertools.islice(batches, self.steps_per_epoch - start_batch):
                    self._step(batch)
                    kl = self.progress.curves.last("kl")
                    bar.advance(config.batch_tokens, note=f"KL {kl:.3f}")
                    if self.progress.step % config.checkpoint_every_steps == 0:
                        self._save()
                self._end_epoch(epoch + 1)
        steps = self.progress.step - first_step
        self.tokens_per_second = steps * config.batch_tokens / (time.monotonic() - started)
        self._load_weights(self.best)

    def _step(self, batch: ActivationBatch) -> None:
        """One optimiser step on N tokens."""
        config, decoder, device = self.config, self.decoder, self.ctx.device
        assert batch.resid is not None
        assert batch.final_hidden is not None
        lr = learning_rate(self.progress.step, self.total_steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.no_grad():
            latents = decoder.frozen.sae.encode(batch.resid.to(device).float())
        with matmul_precision(config.matmul_precision):
            losses = chunked_kl_ce(
                decoder.hidden(latents),
                batch.final_hidden.to(device),
                decoder.frozen.lm,
                labels=self.next_tokens.labels(batch.seq_id, batch.pos).to(device),
                ce_weight=config.ce_weight,
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.loss.mean().backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.progress.step += 1
        self._log(losses, float(grad_norm), lr)

    def _log(self, losses: TokenLosses, grad_norm: float, lr: float) -> None:
        values = {
            "loss": float(losses.loss.detach().mean()),
            "kl": float(losses.kl.mean()),
            "ce": float(losses.ce.mean()),
            "grad_norm": grad_norm,
            "lr": lr,
        }
        if not all(math.isfinite(value) for value in values.values()):
            raise NumericalError(
                f"Step {self.progress.step} of decoder training gave {values}.",
                "The decoder diverged, or the cached activations are damaged.",
                "Lower `train_decoder.lr`; training goes on from the last checkpoint.",
            )
        self.progress.curves.log(self.progress.step, **values)
        self.ctx.report.metrics("train_decoder", self.progress.step, values)

    def _end_epoch(self, epoch: int) -> None:
        """Measure held-out faithfulness, keep the best weights, save a checkpoint."""
        for split, max_tokens in (
            ("validation", self.config.validation_tokens),
            ("ood", self.config.ood_tokens),
        ):
            found = evaluate_faithfulness(
                self.decoder,
                self.readers[split],
                max_tokens=max_tokens,
                seed=derive_seed(self.ctx.seed, "bootstrap"),
                precision=self.config.matmul_precision,
            )
            self.progress.epochs.append({"epoch": epoch, "split": split, **found._asdict()})
            values = {f"{split}_{name}": getattr(found, name) for name in ("kl", "agreement")}
            self.progress.curves.log(self.progress.step, **values)
            self.ctx.report.metrics("train_decoder", self.progress.step, values)
            if split == "validation" and found.kl < self.progress.best_kl:
                self.progress.best_kl, self.progress.best_epoch = found.kl, epoch
                self.best = self._copy_of_weights()
        self._save()

    def _copy_of_weights(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.decoder.state_dict().items()}

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.decoder.load_state_dict(dict(weights))

    def _save(self) -> None:
        tensors, optimizer_state = pack_optimizer(self.optimizer)
        tensors |= {f"now.{name}": t for name, t in self.decoder.state_dict().items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        state = {"optimizer": optimizer_state, **self.progress.state()}
        self.checkpoints.save(self.progress.step, tensors, state)

    def _resume(self) -> bool:
        """Go back to the newest checkpoint; False when there is none."""
        saved = self.checkpoints.load()
        if saved is None:
            return False
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}}
        for name, tensor in saved.tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        self._load_weights(parts["now"])
        self.best = {name: t.to(self.ctx.device) for name, t in parts["best"].items()}
        unpack_optimizer(self.optimizer, saved.tensors, saved.state["optimizer"])
        self.progress = Progress.restore(saved.step, saved.state)
        return True


def steps_per_epoch(num_tokens: int, config: TrainDecoderConfig) -> int:
    """Optimiser steps between evaluations: one pass, or its share of the token budget."""
    available = num_tokens // config.batch_tokens
    if config.budget_tokens is None:
        return max(1, available)
    return max(1, min(available, config.budget_tokens // (config.epochs * config.batch_tokens)))


def learning_rate(step: int, total_steps: int, config: TrainDecoderConfig) -> float:
    """Linear warm-up to `lr`, then half a cosine down to 0 at `total_steps`; `step` from 0."""
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


def _headline(trainer: _Trainer) -> dict[str, Any]:
    progress = trainer.progress
    metrics: dict[str, Any] = {
        "best_epoch": progress.best_epoch,
        "tokens_trained": progress.step * trainer.config.batch_tokens,
        "train_tokens_per_second": round(trainer.tokens_per_second, 1),
    }
    for row in progress.epochs:
        for epoch, prefix in ((0, "start_"), (progress.best_epoch, "")):
            if row["epoch"] == epoch:
                for name in ("kl", "ce", "accuracy", "agreement"):
                    metrics[f"{prefix}{row['split']}_{name}"] = row[name]
    return metrics

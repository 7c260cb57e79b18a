"""Supervised decoder: distil the frozen model's logits into SAE latents.

Starts in closed form: `linear` from the affine lens, one with blocks from the frozen model's own.
Publishes the best epoch by validation KL; epoch 0 is the start without training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from rldecoder.artifacts.catalogue import SupervisedDecoder
from rldecoder.checkpoints import Checkpoints
from rldecoder.config.decoder import TrainDecoderConfig
from rldecoder.curves import Curves
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.shards import read_tokens
from rldecoder.decoder.blocks import evenly_spaced
from rldecoder.decoder.faithfulness import EpochFaithfulness, evaluate_faithfulness
from rldecoder.decoder.loading import (
    AffineLens,
    DecoderOrigin,
    decoder_from_lens,
    read_affine_lens,
    save_decoder,
)
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.start import decoder_from_blocks
from rldecoder.decoder.training import DecoderTrainer
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.schemas import Scalar
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import DecoderInputs


class Progress(BaseModel):
    """What a checkpoint holds beside the weights."""

    best_epoch: int = 0
    best_kl: float = math.inf
    """Finite in every checkpoint: the first evaluation precedes all of them."""
    epochs: list[EpochFaithfulness] = []
    """Of all epochs and splits so far."""
    curves: Curves = Field(default_factory=Curves)


def run(inputs: DecoderInputs, config: TrainDecoderConfig, ctx: StageContext) -> Output:
    """Train the decoder; see the module's docstring for what is published."""
    seed_everything(ctx.seed)
    sae = inputs.sae.load(ctx.device)
    lm = inputs.model.load(ctx.device)
    lens = read_affine_lens(inputs.baselines.affine_lens, sae.spec.hook_layer)
    readers = {name: inputs.cache.reader(name) for name in ("train", "validation", "ood")}
    decoder = _start(lm, sae, lens, inputs, config, ctx)

    loop = _Loop(decoder, readers, config, ctx)
    loop.fit()

    save_decoder(decoder, SupervisedDecoder.decoder.path(ctx.out))
    lens.save(SupervisedDecoder.lens.path(ctx.out))
    data = (inputs.cache, inputs.sae, inputs.baselines)
    origin = DecoderOrigin(
        blocks=decoder.upper.numbers,
        trained_on={artifact.stage: artifact.digest for artifact in data},
    )
    SupervisedDecoder.origin.save(ctx.out, origin)
    rows = [row.model_dump() for row in loop.progress.epochs]
    SupervisedDecoder.epochs.save_rows(ctx.out, rows)
    loop.progress.curves.write(SupervisedDecoder.curves.path(ctx.out))
    return Output(_headline(loop))


def _start(
    lm: FrozenLM,
    sae: Sae,
    lens: AffineLens,
    inputs: DecoderInputs,
    config: TrainDecoderConfig,
    ctx: StageContext,
) -> SaeDecoderForCausalLM:
    """The decoder before any training, of the depth that the config or the frontier names."""
    layer, depth = sae.spec.hook_layer, config.depth
    if depth == "auto":
        depth = inputs.frontier.verdict_record.depths[layer]
        ctx.report.note(f"depth {depth}, as the frontier recommends at layer {layer}")
    if depth == 0:
        return decoder_from_lens(lm, sae, lens)
    if depth > lm.num_layers - layer:
        raise BadInputError(
            f"`train_decoder.depth` is {depth}.",
            f"Above layer {layer} the model has {lm.num_layers - layer} blocks to start from.",
            "Give at most that many.",
        )

    # Closed form: every map is fitted on the text that the frozen model reads.
    ingest = inputs.corpus.folder
    length = read_tokens(ingest, "train", 1).shape[1]
    ids = torch.from_numpy(read_tokens(ingest, "train", max(8, config.fit_tokens // length)))
    with ctx.report.track("fit decoder", ids.numel(), unit="tok") as bar:
        return decoder_from_blocks(
            lm,
            sae,
            evenly_spaced(layer, lm.num_layers, depth),
            ids,
            init=config.init,
            advance=bar.advance,
        )


class _Loop:
    """Training with evaluation after every epoch, and everything it needs to stop and go on."""

    def __init__(
        self,
        decoder: SaeDecoderForCausalLM,
        readers: Mapping[str, ActivationReader],
        config: TrainDecoderConfig,
        ctx: StageContext,
    ) -> None:
        self.decoder, self.readers, self.config, self.ctx = decoder, readers, config, ctx
        seed = derive_seed(ctx.seed, "batches")
        self.trainer = DecoderTrainer(decoder, readers["train"], config, seed)
        self.checkpoints = Checkpoints(ctx.progress, owner=ctx.owner, note=ctx.report.note)
        self.progress = Progress()
        self.best = self._copy_of_weights()
        self.tokens_per_second = 0.0

    def fit(self) -> None:
        """Train from the last checkpoint, or from the start, and leave the best weights."""
        if not self._resume():
            self._end_epoch(0)

        trainer, config = self.trainer, self.config
        started, first = time.monotonic(), trainer.tokens_done
        with self.ctx.report.track(
            "train decoder",
            trainer.total_steps * config.batch_tokens,
            unit="tok",
            done=trainer.step_done * config.batch_tokens,
        ) as bar:
            while trainer.step_done < trainer.total_steps:
                for batch in trainer.rest_of_epoch():
                    values = trainer.step(batch)._asdict()
                    self.progress.curves.log(trainer.step_done, **values)
                    self.ctx.report.metrics("train_decoder", trainer.step_done, values)
                    bar.advance(config.batch_tokens, note=f"KL {values['kl']:.3f}")
                    if trainer.step_done % config.checkpoint_every_steps == 0:
                        self._save()
                self._end_epoch(trainer.step_done // trainer.steps_per_epoch)

        seconds = time.monotonic() - started
        self.tokens_per_second = (trainer.tokens_done - first) / seconds
        self.decoder.load_state_dict(self.best)

    def _end_epoch(self, epoch: int) -> None:
        """Measure held-out faithfulness, keep the best weights, save a checkpoint."""
        step = self.trainer.step_done
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
            measured = EpochFaithfulness(epoch=epoch, split=split, **found.model_dump())
            self.progress.epochs.append(measured)
            values = {f"{split}_{name}": getattr(found, name) for name in ("kl", "agreement")}
            self.progress.curves.log(step, **values)
            self.ctx.report.metrics("train_decoder", step, values)
            if split == "validation" and found.kl < self.progress.best_kl:
                self.progress.best_kl, self.progress.best_epoch = found.kl, epoch
                self.best = self._copy_of_weights()
        self._save()

    def _copy_of_weights(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.decoder.state_dict().items()}

    def _save(self) -> None:
        tensors, state = self.trainer.state()
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        self.checkpoints.save(self.trainer.step_done, tensors, state | self.progress.model_dump())

    def _resume(self) -> bool:
        """Go back to the newest checkpoint; False when there is none."""
        saved = self.checkpoints.load()
        if saved is None:
            return False
        self.trainer.restore(saved.step, saved.tensors, saved.state)
        self.best = {
            name.removeprefix("best."): tensor.to(self.ctx.device)
            for name, tensor in saved.tensors.items()
            if name.startswith("best.")
        }
        self.progress = Progress.model_validate(saved.state)
        return True


def _headline(loop: _Loop) -> dict[str, Scalar]:
    progress, trainer = loop.progress, loop.trainer
    metrics: dict[str, Scalar] = {
        "depth": len(loop.decoder.upper.numbers),
        "best_epoch": progress.best_epoch,
        "tokens_trained": trainer.tokens_done,
        "train_tokens_per_second": round(loop.tokens_per_second, 1),
    }
    for row in progress.epochs:
        for epoch, prefix in ((0, "start_"), (progress.best_epoch, "")):
            if row.epoch == epoch:
                for name in ("kl", "ce", "accuracy", "agreement"):
                    metrics[f"{prefix}{row.split}_{name}"] = getattr(row, name)
    return metrics

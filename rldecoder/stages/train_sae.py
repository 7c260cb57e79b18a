"""Train the sparse autoencoder on cached residuals; publish the weights of the best held-out fvu.

In streaming mode the frozen model computes the residuals of the train split as they are needed,
here, shared by the training's processes, or, a window ahead, on a cluster.
Killed and run again, the stage goes on from its last checkpoint and ends with the same bytes.
With `pretrained` nothing is trained: somebody else's SAE is published as it is, and measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rldecoder.artifacts.catalogue import TrainedSae
from rldecoder.artifacts.store import MANIFEST
from rldecoder.checkpoints import Checkpoints
from rldecoder.config.sae import PretrainedSae, Retraining, TrainSaeConfig
from rldecoder.curves import Curves
from rldecoder.data.activation_reader import ShuffledActivations
from rldecoder.data.streaming import StreamedActivations
from rldecoder.errors import BadInputError, DamagedFileError, NumericalError
from rldecoder.executors.teams import Member, make_task
from rldecoder.lm.user_cache import sha256_file
from rldecoder.sae.drift import DriftState, DriftWatch
from rldecoder.sae.fit import Surroundings, check_fit, described
from rldecoder.sae.interop import write_sae
from rldecoder.sae.metrics import reconstruction_quality
from rldecoder.sae.model import Sae
from rldecoder.sae.parallel import Group
from rldecoder.sae.pretrained import SaeSource, read_weights
from rldecoder.sae.releases import find
from rldecoder.sae.training import (
    BestSae,
    SaeTrainer,
    StepResult,
    input_statistics,
    published_spec,
)
from rldecoder.schemas import read_json
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages import preflight
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import Placed, SaeInputs, opened, placed
from rldecoder.stages.streams import open_stream

MEASURED_TOKENS = 2048
"""Rows that a pretrained SAE encodes at once."""


def run(inputs: SaeInputs, config: TrainSaeConfig, ctx: StageContext) -> Output:
    """Train until `budget_tokens` are consumed, or publish the SAE that is given."""
    if config.pretrained is not None:
        return _take(inputs, config, config.pretrained, ctx)
    if config.processes == 1:
        with ExitStack() as stack:
            return _train(_Training(inputs, config, ctx, Group(), stack), ctx)

    # A team of processes, which goes on from the last checkpoint where one of them is lost.
    settings = TeamSettings(
        inputs=placed(inputs), config=config, seed=ctx.seed, owner=ctx.owner,
        out=ctx.out.absolute(), progress=ctx.progress.absolute(),
    )  # fmt: skip
    task = make_task(
        train_together, settings, folder=ctx.progress, owner=ctx.owner,
        reads=[artifact.folder for artifact in inputs],
    )  # fmt: skip
    metrics = json.loads(
        ctx.executor.team(task, config.processes, device=ctx.device, report=ctx.report)
    )
    return Output(metrics)


class TeamSettings(BaseModel):
    """What each process of a training is told: a stage's context without what is of one process."""

    model_config = ConfigDict(frozen=True)

    inputs: tuple[Placed, ...]
    config: TrainSaeConfig
    out: Path
    progress: Path
    seed: int
    owner: str


def train_together(text: str, member: Member) -> str:
    """Train as one of several processes; the first one evaluates, keeps and publishes.

    Returns:
        The headline metrics as JSON; of the others nothing.
    """
    settings = TeamSettings.model_validate_json(text)
    inputs, config = opened(SaeInputs, settings.inputs), settings.config
    ctx = StageContext(
        settings.out, settings.progress, settings.seed, member.device, member.report,
        owner=settings.owner,
    )  # fmt: skip
    with ExitStack() as stack:
        training = _Training(inputs, config, ctx, Group(member.rank, member.size), stack)
        if member.rank == 0:
            return json.dumps(dict(_train(training, ctx, member.kept).metrics))
        while training.trainer.step_index < training.num_steps:
            training.step()
    return ""


class _Training:
    """What all processes hold: data, trainer, and where in the data it is."""

    def __init__(
        self,
        inputs: SaeInputs,
        config: TrainSaeConfig,
        ctx: StageContext,
        group: Group,
        stack: ExitStack,
    ) -> None:
        seed_everything(ctx.seed)
        self.inputs, self.config = inputs, config
        self.reader = open_train_split(inputs, config, ctx, stack, group)
        self.num_steps = max(1, config.budget_tokens // config.batch_tokens)
        batch_seed = derive_seed(ctx.seed, "batches")
        meta = self.reader.meta
        spec = published_spec(
            config,
            meta.d_model,
            hook_layer=meta.hook_layer,
            model_name=meta.model_name,
            context_length=meta.context_length,
        )

        # The first rows of the first epoch: a stream has computed them by then.
        statistics = input_statistics(_sample(self.reader, config.init_tokens, batch_seed))
        self.trainer = SaeTrainer(
            spec, config, self.num_steps, statistics, ctx.seed, ctx.device, group
        )
        if config.retrain is not None:
            flagged = flagged_latents(config.retrain)
            self.trainer.start_from(Sae.load(config.retrain.sae), flagged)
            ctx.report.note(
                f"train_sae starts from {config.retrain.sae}; {len(flagged)} latents resampled"
            )

        # A killed run goes on where its last checkpoint was, data and drift watch included.
        self.watch, self.curves = DriftWatch(config), Curves()
        self.checkpoints = Checkpoints(
            ctx.progress / "train_sae", owner=ctx.owner, note=ctx.report.note
        )
        self.position = Position(0, 0)
        checkpoint = self.checkpoints.load()
        if checkpoint is not None:
            self.trainer.unpack(checkpoint.tensors, checkpoint.state["trainer"])
            self.watch.state = DriftState.model_validate(checkpoint.state["watch"])
            self.curves = Curves.model_validate(checkpoint.state["curves"])
            self.position = Position(*checkpoint.state["position"])
            if isinstance(self.reader, StreamedActivations):
                self.reader.rows_found |= dict(checkpoint.state["stream_rows"])
            ctx.report.note(
                f"train_sae goes on from step {self.trainer.step_index} of {self.num_steps}"
            )

        self._batches = _batches(self.reader, config.batch_tokens, batch_seed, self.position)

    def step(self) -> StepResult:
        """The next batch."""
        batch, self.position = next(self._batches)
        result = self.trainer.step(batch)
        if self.is_to_be_kept:
            self.trainer.agree()
        return result

    @property
    def is_to_be_kept(self) -> bool:
        """Whether a checkpoint belongs behind the last step."""
        step = self.trainer.step_index
        return step % self.config.checkpoint_every_steps == 0 and step < self.num_steps

    def save(self) -> None:
        """A checkpoint from which a killed run goes on exactly."""
        tensors, trainer = self.trainer.pack()
        state = {
            "trainer": trainer,
            "watch": self.watch.state.model_dump(),
            "curves": self.curves.model_dump(),
            "position": self.position,
        }
        if isinstance(self.reader, StreamedActivations):
            state["stream_rows"] = list(self.reader.rows_found.items())
        self.checkpoints.save(self.trainer.step_index, tensors, state)


def _train(
    training: _Training, ctx: StageContext, kept: Callable[[], None] = lambda: None
) -> Output:
    """What the first process, or the only one, does.

    Args:
        kept: called after each checkpoint.
    """
    config, trainer, curves = training.config, training.trainer, training.curves
    num_steps = training.num_steps
    held_out = _sample(
        training.inputs.cache.reader("validation"),
        config.eval_tokens,
        derive_seed(ctx.seed, "validation"),
    )

    # What is cheap is logged often; a held-out pass decides which weights are published.
    started, first = time.perf_counter(), trainer.step_index
    total, done = num_steps * config.batch_tokens, first * config.batch_tokens
    with _alerted(ctx), ctx.report.track("SAE", total, "tokens", done) as bar:
        while trainer.step_index < num_steps:
            result = training.step()
            step = trainer.step_index
            for message in training.watch.observe(step, result):
                ctx.report.alert(message)
            if step % config.log_every_steps == 0 or step == num_steps:
                curves.log(step, **result._asdict())
                ctx.report.metrics("train_sae", step, result._asdict())
            if step % config.eval_every_steps == 0 or step == num_steps:
                fvu, l0 = trainer.evaluate(held_out.split(config.batch_tokens))
                values = {"validation_fvu": fvu, "validation_l0": l0}
                curves.log(step, **values)
                ctx.report.metrics("train_sae", step, values)
            if training.is_to_be_kept:
                training.save()
                kept()
            bar.advance(config.batch_tokens, f"fvu {trainer.best_fvu:.3f} mse {result.mse:.3f}")
    seconds = max(time.perf_counter() - started, 1e-9)

    trainer.sae(best=True).save(TrainedSae.sae.path(ctx.out))
    curves.write(TrainedSae.curves.path(ctx.out))
    best = BestSae(
        split="validation",
        fvu=trainer.best_fvu,
        step=trainer.best_step,
        num_steps=num_steps,
        tokens=total,
        epochs=total / training.reader.num_tokens,
        dead_fraction=trainer.dead_fraction,
    )
    TrainedSae.best.save(ctx.out, best)
    speed = (num_steps - first) * config.batch_tokens / seconds
    return Output(
        best.headline | {"validation_l0": curves.last("validation_l0"), "tokens_per_second": speed}
    )


def _take(
    inputs: SaeInputs, config: TrainSaeConfig, pretrained: PretrainedSae, ctx: StageContext
) -> Output:
    """Publish a folder's SAE, bit for bit, with what it reaches on the validation split."""
    meta = inputs.cache.meta
    found = find(pretrained)
    description = described(found)
    around = preflight.with_model(Surroundings(meta.hook_layer, meta.context_length), inputs.model)
    caveats = check_fit(description, int(found.config["d_in"]), around, pretrained.accept)
    weights = read_weights(found, description, meta.model_name)
    ctx.report.note(
        f"train_sae takes the {found.form} SAE at {found.weights.parent}; nothing is trained, and "
        "of its settings only eval_tokens is read"
    )
    wide = [dtype for dtype in weights.dtypes if dtype != "float32"]
    if wide:
        ctx.report.note(f"its {', '.join(wide)} weights are kept as float32, without rounding")
    for change in weights.changes:
        ctx.report.note(f"not as it was in its folder: {change}")

    sae_folder = TrainedSae.sae.path(ctx.out)
    write_sae(sae_folder, weights.spec, weights.tensors, rescaled=weights.rescaled)
    sae = Sae.load(sae_folder, ctx.device)
    rows = _sample(
        inputs.cache.reader("validation"), config.eval_tokens, derive_seed(ctx.seed, "validation")
    )
    quality = reconstruction_quality(sae, rows.split(MEASURED_TOKENS))
    values = {"validation_fvu": quality.fvu, "validation_l0": quality.l0_mean}
    curves = Curves()
    curves.log(0, **values)
    curves.write(TrainedSae.curves.path(ctx.out))
    best = BestSae(
        split="validation", fvu=quality.fvu, step=0, num_steps=0, tokens=0, epochs=0.0,
        dead_fraction=quality.dead_fraction,
    )  # fmt: skip
    TrainedSae.best.save(ctx.out, best)
    source = SaeSource(
        form=found.form,
        weights_sha256=sha256_file(found.weights),
        model_name=description.model_name,
        hook_name=description.hook_name,
        hook_layer=description.hook_layer,
        architecture=description.architecture,
        context_length=weights.spec.context_length,
        prepend_bos=description.prepend_bos,
        dtypes=weights.dtypes,
        changes=weights.changes,
    )
    source.save(TrainedSae.source.path(ctx.out))
    return Output(best.headline | values, reasons=caveats)


@contextmanager
def _alerted(ctx: StageContext) -> Iterator[None]:
    """Divergence ends the stage, and is an alert like every other drift."""
    try:
        yield
    except NumericalError as error:
        ctx.report.alert(str(error))
        raise


class Position(NamedTuple):
    """Where the next batch is."""

    epoch: int
    batch: int


def flagged_latents(retrain: Retraining) -> Tensor:
    """[n] int64: latents that `cluster_features` flagged for one of the chosen reasons.

    Raises:
        DamagedFileError: the file is no clusters.json.
        BadInputError: it is of another SAE than the published one that is named.
    """
    if retrain.clusters is None:
        return torch.empty(0, dtype=torch.long)
    try:
        found = read_json(retrain.clusters)
        rows, of = found["flagged"], found["sae_digest"]
        chosen = [row["latent"] for row in rows if set(row["reasons"]) & set(retrain.reasons)]
    except (KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{retrain.clusters} does not say which latents are flagged.",
            f"It has no {error}.",
            "Name clusters.json of a `cluster_features` artifact.",
        ) from error
    artifact = retrain.sae.resolve().parent  # named by its digest, if it is one
    if (artifact / MANIFEST).is_file() and artifact.name != of:
        raise BadInputError(
            f"{retrain.clusters} flags latents of the SAE {of}.",
            f"Training is to go on from {artifact.name}, whose latents are others.",
            "Name clusters.json of a `cluster_features` artifact made over that SAE.",
        )
    return torch.tensor(sorted(chosen), dtype=torch.long)


def open_train_split(
    inputs: SaeInputs, config: TrainSaeConfig, ctx: StageContext, stack: ExitStack, group: Group
) -> ShuffledActivations:
    """The training activations, from the cache or from the frozen model.

    Args:
        stack: closed when they are no longer read.
        group: processes that share the model's work.
    """
    if config.source == "cache":
        return inputs.cache.reader("train", config.window_bytes)

    # Of several processes, each computes its part.
    return stack.enter_context(
        open_stream(
            *inputs,
            ctx,
            columns=("resid",),
            window_bytes=config.window_bytes,
            max_tokens=config.stream_tokens,
            peers=group if group.size > 1 else None,
        )
    )


def _sample(reader: ShuffledActivations, num_tokens: int, seed: int) -> Tensor:
    """The first residuals [N, D] in a random order; fewer when the split is smaller."""
    batch = next(reader.shuffled(min(num_tokens, reader.num_tokens), seed=seed, drop_last=False))
    assert batch.resid is not None
    return batch.resid


def _batches(
    reader: ShuffledActivations, batch_tokens: int, seed: int, start: Position
) -> Iterator[tuple[Tensor, Position]]:
    """Endless [N, D] batches, one shuffled epoch after the other; each with where the next is."""
    epoch, index = start
    while True:
        for batch in reader.shuffled(batch_tokens, seed=seed, epoch=epoch, start_batch=index):
            assert batch.resid is not None
            index += 1
            yield batch.resid, Position(epoch, index)
        epoch, index = epoch + 1, 0

"""Rank latents by what they do to predictions: attribution patching, validated exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rldecoder.artifacts.catalogue import Importance, ModelFolder
from rldecoder.checkpoints import Checkpoints
from rldecoder.config.interp import Domain, RankFeaturesConfig
from rldecoder.executors.jobs import Result, Settings, TensorWorker, even_ends
from rldecoder.interp.importance import Subject, TargetName
from rldecoder.interp.patch_shards import (
    AttributionSettings,
    AttributionWorker,
    ExactSettings,
    ExactWorker,
    PatchText,
)
from rldecoder.interp.tally import ImportanceMass, Tally, TargetMass
from rldecoder.interp.validation import Ablation, EstimatorValidation, effects_of, validate
from rldecoder.reporting import Bar
from rldecoder.schemas import Scalar
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import RankInputs

LATENTS = 8
"""Latents that a shard ablates."""


def run(inputs: RankInputs, config: RankFeaturesConfig, ctx: StageContext) -> Output:
    """Choose the estimator of each target, then add up its attributions over all domains."""
    seed_everything(ctx.seed)
    # float32: ablation effects are small differences, which bfloat16 logits (16 apart by 0.06
    # and more) would drown.
    lm = inputs.model.load(ctx.device, dtype=torch.float32)
    sae = inputs.sae.load(ctx.device)
    subject = Subject(lm, sae, inputs.final.load(lm, sae).requires_grad_(False))
    skip_first = inputs.cache.reader("label").meta.skip_first
    text = PatchText(inputs.corpus.folder, config, ctx.seed, subject, skip_first)
    crew = None if ctx.executor.is_here else _Crew(inputs, config, ctx, text)
    progress = _Progress(config, ctx, sae.num_latents, resume=crew is None)

    validation = _validate(text, config, ctx, progress, crew)
    for name, target in validation.targets.items():
        ctx.report.note(f"{name}: {target.used.estimator} ({target.used.reason})")
    used = {name: target.used for name, target in validation.targets.items()}
    steps = {
        target: config.integrated_steps if used[target].integrated else None
        for target in config.targets
    }
    for domain in config.domains:
        if crew is None:
            _attribute_domain(domain, text, config, ctx, progress, steps)
        else:
            crew.attribute(domain, steps, progress)

    rows: dict[str, list[Any]] = {name: [] for name in Importance.table.schema.names}
    masses: dict[str, dict[str, TargetMass]] = {}
    for (domain, name), tally in progress.tallies.items():
        part = tally.columns()
        number = len(part["latent"])
        for column, values in (
            part | {"domain": [domain] * number, "target": [name] * number}
        ).items():
            rows[column] += values
        seed = derive_seed(ctx.seed, "mass", domain, name)
        masses.setdefault(domain, {})[name] = tally.mass(seed=seed)
    mass = ImportanceMass(masses)
    Importance.table.save(ctx.out, rows)
    Importance.mass.save(ctx.out, mass)
    Importance.validation.save(ctx.out, validation)

    error_shares: dict[str, Scalar] = {
        f"{name}_error_share_{validation.domain}": (
            None if found.error_share is None else found.error_share.value
        )
        for name, found in mass.root[validation.domain].items()
    }
    return Output(
        validation.headline | mass.headline | error_shares,
        reasons=tuple(
            f"importance ({name}) by {target.used.estimator}: {target.used.reason}"
            for name, target in validation.targets.items()
            if not target.used.reached
        ),
    )


class _Progress:
    """What a killed run takes up: exact effects found so far, and the sums of each domain.

    Args:
        resume: whether it is taken up; the shards of workers begin with the first sequence.
    """

    def __init__(
        self, config: RankFeaturesConfig, ctx: StageContext, num_latents: int, *, resume: bool
    ) -> None:
        self.exact: dict[str, list[float]] = {target: [] for target in config.targets}
        self.tallies = {
            (domain, target): Tally(num_latents)
            for domain in config.domains
            for target in config.targets
        }
        self.sequences: dict[str, int] = dict.fromkeys(config.domains, 0)
        self._checkpoints = Checkpoints(
            ctx.progress / "rank_features", keep=1, owner=ctx.owner, note=ctx.report.note
        )
        self._seconds, self._saved, self._step = config.checkpoint_seconds, time.monotonic(), 0

        # Taken up where a killed run stopped: sums, and exact effects by target.
        found = self._checkpoints.load() if resume else None
        if found is None:
            return
        self._step = found.step
        self.exact, self.sequences = found.state["exact"], found.state["sequences"]
        for (domain, target), tally in self.tallies.items():
            prefix = f"{domain}.{target}."
            tally.restore(
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in found.tensors.items()
                    if name.startswith(prefix)
                }
            )

    def save_now_and_then(self) -> None:
        """Write a checkpoint if the last one is old enough."""
        if time.monotonic() - self._saved < self._seconds:
            return
        self._step += 1
        tensors = {
            f"{domain}.{target}.{name}": tensor
            for (domain, target), tally in self.tallies.items()
            for name, tensor in tally.state().items()
        }
        self._checkpoints.save(
            self._step, tensors, {"exact": self.exact, "sequences": self.sequences}
        )
        self._saved = time.monotonic()


def _attribute_domain(
    domain: Domain,
    text: PatchText,
    config: RankFeaturesConfig,
    ctx: StageContext,
    progress: _Progress,
    steps: Mapping[TargetName, int | None],
) -> None:
    """Add the attributions of a domain to its tallies, from where an earlier run stopped."""
    done, total = progress.sequences[domain], text.num_sequences(domain)
    with ctx.report.track(f"importance on {domain}", total, "seq", done) as bar:
        for batch in text.batches(domain, first=done):
            for target in config.targets:
                for found in text.attributions(target, batch, steps[target]):
                    progress.tallies[domain, target].add(found)
            progress.sequences[domain] += batch.metric_mask.shape[0]
            bar.advance(batch.metric_mask.shape[0])
            progress.save_now_and_then()


def _validate(
    text: PatchText,
    config: RankFeaturesConfig,
    ctx: StageContext,
    progress: _Progress,
    crew: _Crew | None,
) -> EstimatorValidation:
    """The comparison with exact ablation, for each target."""
    total = (config.validation_top + config.validation_others) * len(config.targets)
    done = sum(len(values) for values in progress.exact.values())
    with ctx.report.track("exact patching", total, "latent", done) as bar:

        def exact(target: TargetName, ablation: Ablation, latents: Sequence[int]) -> list[float]:
            if crew is not None:
                return crew.effects(target, latents, bar)

            def keep(values: list[float]) -> None:
                progress.exact[target] = values
                bar.advance()
                progress.save_now_and_then()

            return effects_of(ablation, latents, progress.exact[target], keep)

        found = {}
        for target in config.targets:
            ablation = text.ablation(target)
            found[target] = validate(
                ablation, text.subject.sae.num_latents, partial(exact, target, ablation),
                num_top=config.validation_top, num_others=config.validation_others,
                integrated_steps=config.integrated_steps,
                seed=derive_seed(ctx.seed, "validate", target), wanted=config.estimator,
                min_spearman=config.min_spearman,
            )  # fmt: skip
    return EstimatorValidation(
        domain=config.validation_domain, decoder=found.get("decoder"), frozen=found.get("frozen")
    )


class _Crew:
    """Has the same done by the workers of the stage's executor."""

    def __init__(
        self, inputs: RankInputs, config: RankFeaturesConfig, ctx: StageContext, text: PatchText
    ) -> None:
        self.ctx, self.text = ctx, text
        self._reads = [
            artifact.folder for artifact in (inputs.model, inputs.corpus, inputs.sae, inputs.final)
        ]
        self._common: dict[str, Any] = {
            "model": inputs.model.model.absolute(),
            "record": ModelFolder.record.path(inputs.model.folder).absolute(),
            "sae": inputs.sae.sae.absolute(),
            "decoder": inputs.final.decoder.absolute(),
            "corpus": inputs.corpus.folder.absolute(),
            "config": config,
            "seed": ctx.seed,
            "skip_first": text.skip_first,
        }

    def effects(self, target: TargetName, latents: Sequence[int], bar: Bar) -> list[float]:
        """Exact effects, in nats; the bar is moved on at the end, for the job has its own."""
        settings = ExactSettings(
            **self._common,
            name=target,
            ends=even_ends(len(latents), LATENTS),
            target=target,
            latents=tuple(latents),
        )
        effects = list(self._results(ExactWorker, settings, f"exact patching, {target}"))
        bar.advance(len(latents))
        return [effect for part in effects for effect in part]

    def attribute(
        self, domain: Domain, steps: Mapping[TargetName, int | None], progress: _Progress
    ) -> None:
        """Add the attributions of a domain to its tallies, which are empty."""
        text = self.text
        settings = AttributionSettings(
            **self._common,
            name=domain,
            ends=even_ends(text.num_sequences(domain), text.shard_sequences(domain)),
            domain=domain,
            steps=dict(steps),
        )
        for part in self._results(AttributionWorker, settings, f"importance on {domain}"):
            for target, sequences in part.items():
                for found in sequences:
                    progress.tallies[domain, target].add(found)

    def _results(
        self, worker: type[TensorWorker[Settings, Result]], settings: Settings, title: str
    ) -> Iterator[Result]:
        return self.ctx.shards.results(worker, settings, self._reads, worker.__name__, title)

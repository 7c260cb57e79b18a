"""Rank latents by what they do to predictions: attribution patching, validated exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rldecoder.artifacts.catalogue import Importance
from rldecoder.checkpoints import Checkpoints
from rldecoder.config.interp import Domain, RankFeaturesConfig
from rldecoder.data.shards import read_tokens
from rldecoder.evals.prompts import make_prompts
from rldecoder.interp.importance import (
    PatchBatch,
    Subject,
    attribute,
    considered_positions,
    make_batch,
)
from rldecoder.interp.tally import ImportanceMass, Tally, TargetMass
from rldecoder.interp.validation import EstimatorValidation, validate
from rldecoder.lm.text_tokens import encode_prompts
from rldecoder.schemas import Scalar
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import RankInputs

TASKS = ("addition", "cloze")


def run(inputs: RankInputs, config: RankFeaturesConfig, ctx: StageContext) -> Output:
    """Choose the estimator of each target, then add up its attributions over all domains."""
    seed_everything(ctx.seed)
    # float32: ablation effects are small differences, which bfloat16 logits (16 apart by 0.06
    # and more) would drown.
    lm = inputs.model.load(ctx.device, dtype=torch.float32)
    sae = inputs.sae.load(ctx.device)
    subject = Subject(lm, sae, inputs.final.load(lm, sae).requires_grad_(False))
    skip_first = inputs.cache.reader("label").meta.skip_first
    loader = _Loader(inputs.corpus.folder, config, ctx, subject, skip_first)
    progress = _Progress(config, ctx, sae.num_latents)

    validation = _validate(loader, config, ctx, subject, progress)
    for name, target in validation.targets.items():
        ctx.report.note(f"{name}: {target.used.estimator} ({target.used.reason})")
    for domain in config.domains:
        _attribute_domain(domain, loader, config, ctx, subject, progress, validation)

    rows: dict[str, list[Any]] = {name: [] for name in Importance.table.schema.names}
    masses: dict[str, dict[str, TargetMass]] = {}
    for (domain, name), tally in progress.tallies.items():
        part = tally.columns()
        rows["latent"] += part.latent.tolist()
        rows["domain"] += [domain] * part.latent.size
        rows["target"] += [name] * part.latent.size
        rows["importance"] += part.importance.tolist()
        rows["signed"] += part.signed.tolist()
        rows["count"] += part.count.tolist()
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
    """What a killed run takes up: exact effects found so far, and the sums of each domain."""

    def __init__(self, config: RankFeaturesConfig, ctx: StageContext, num_latents: int) -> None:
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
        found = self._checkpoints.load()
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
    loader: _Loader,
    config: RankFeaturesConfig,
    ctx: StageContext,
    subject: Subject,
    progress: _Progress,
    validation: EstimatorValidation,
) -> None:
    """Add the attributions of a domain to its tallies, from where an earlier run stopped."""
    done, total = progress.sequences[domain], loader.num_sequences(domain)
    with ctx.report.track(f"importance on {domain}", total, "seq", done) as bar:
        for batch in loader.batches(domain, first=done):
            for target in config.targets:
                used = validation.targets[target].used.estimator
                steps = config.integrated_steps if used == "integrated_gradients" else None
                found = attribute(subject.metric(target), batch, steps)
                considered = considered_positions(
                    batch, looks_back=subject.looks_back(target), skip_first=loader.skip_first
                )
                progress.tallies[domain, target].add(batch, found, considered)
            progress.sequences[domain] += batch.metric_mask.shape[0]
            bar.advance(batch.metric_mask.shape[0])
            progress.save_now_and_then()


class _Loader:
    """Makes the patch batches of a domain."""

    def __init__(
        self,
        corpus: Path,
        config: RankFeaturesConfig,
        ctx: StageContext,
        subject: Subject,
        skip_first: int,
    ) -> None:
        self.corpus = corpus
        self.config, self.ctx, self.subject = config, ctx, subject
        self.skip_first = skip_first

    def num_sequences(self, domain: Domain) -> int:
        """How many sequences `batches` yields in all."""
        return len(self._sequences(domain))

    def batches(
        self, domain: Domain, max_tokens: int | None = None, first: int = 0
    ) -> Iterator[PatchBatch]:
        """Patch batches of a domain, from its sequence number `first` on.

        `max_tokens` stops early, after at least one sequence.
        """
        task = domain in TASKS
        sequences = self._sequences(domain)
        if max_tokens is not None:
            ends = np.cumsum([len(sequence) for sequence in sequences])
            sequences = sequences[: max(1, int(np.searchsorted(ends, max_tokens, "right")))]
        # Prompts differ in length and are run one by one, which spares padding.
        size = 1 if task else self.config.batch_sequences
        for start in range(first, len(sequences), size):
            rows = np.stack(sequences[start : start + size])
            ids = torch.as_tensor(rows, dtype=torch.long, device=self.ctx.device)
            yield make_batch(
                self.subject,
                ids,
                self._metric_mask(ids, task),
                metric_token="frozen_argmax" if task else self.config.metric_token,
                skip_first=self.skip_first,
            )

    def _metric_mask(self, ids: Tensor, task: bool) -> Tensor:
        mask = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        if task:
            mask[:, -1] = True
        else:
            # Ends at the last position but one: the last has no next token.
            mask[:, self.skip_first : -1 : self.config.metric_stride] = True
        return mask

    def _sequences(self, domain: Domain) -> list[np.ndarray[Any, Any]]:
        if domain in ("label", "test", "ood"):
            length = read_tokens(self.corpus, domain, 1).shape[1]
            count = math.ceil(self.config.budget_tokens / length)
            return list(read_tokens(self.corpus, domain, count))
        assert domain in TASKS
        # Prompts of the training split: evaluation keeps the test split to itself.
        prompts = make_prompts(
            "addition" if domain == "addition" else "cloze",
            "train",
            self.config.num_prompts,
            derive_seed(self.ctx.seed, "prompts", domain),
        )
        lm = self.subject.lm
        texts = [prompt.prompt for prompt in prompts]
        return [np.array(row) for row in encode_prompts(lm.tokenizer, texts, lm.context_length)]


def _validate(
    loader: _Loader,
    config: RankFeaturesConfig,
    ctx: StageContext,
    subject: Subject,
    progress: _Progress,
) -> EstimatorValidation:
    """The comparison with exact ablation, for each target."""
    # Kept in memory: each is run once for every latent that is ablated.
    batches = list(loader.batches(config.validation_domain, config.validation_tokens))
    total = (config.validation_top + config.validation_others) * len(config.targets)
    done = sum(len(values) for values in progress.exact.values())
    with ctx.report.track("exact patching", total, "latent", done) as bar:

        def keep(target: str, values: list[float]) -> None:
            progress.exact[target] = values
            bar.advance()
            progress.save_now_and_then()

        found = {
            target: validate(
                subject.metric(target),
                batches,
                subject.sae.num_latents,
                num_top=config.validation_top,
                num_others=config.validation_others,
                integrated_steps=config.integrated_steps,
                seed=derive_seed(ctx.seed, "validate", target),
                wanted=config.estimator,
                min_spearman=config.min_spearman,
                known=progress.exact[target],
                on_exact=partial(keep, target),
            )
            for target in config.targets
        }
    return EstimatorValidation(
        domain=config.validation_domain, decoder=found.get("decoder"), frozen=found.get("frozen")
    )

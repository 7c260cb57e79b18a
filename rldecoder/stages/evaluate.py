"""Stage evaluate: frozen model, supervised decoder and RL decoder side by side on held-out data.

Publishes scores with intervals, every completion, faithfulness on test and ood text, how well
labels, rankings and claims hold, and every target of the plan: met, missed or unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rldecoder.artifacts.catalogue import (
    Controls,
    Evaluation,
    Importance,
    Labels,
    ModelFolder,
    SaeGate,
    TrainedExplainer,
)
from rldecoder.config.explain import EvaluateConfig, HarnessConfig
from rldecoder.decoder.faithfulness import Faithfulness, decoder_predictor, summarise
from rldecoder.decoder.faithfulness_shards import (
    FaithfulnessSettings,
    FaithfulnessWorker,
    batch_ends,
)
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.answer_shards import AnswerSettings, AnswerWorker
from rldecoder.evals.comparison import (
    FROZEN,
    RL,
    SUPERVISED,
    Answer,
    FaithfulnessTable,
    TaskScore,
    score_tasks,
)
from rldecoder.evals.harness_scores import HarnessScores, beside_ours
from rldecoder.evals.harness_systems import decoder_system, frozen_system, spliced_system
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.evals.suite import TaskSuite, check_lengths
from rldecoder.evals.targets import Measurement, Source, fill_targets
from rldecoder.explain import plan_values
from rldecoder.explain.interpretability import (
    Interpretability,
    deletion_benchmark,
    label_coverage,
    ranking_orders,
)
from rldecoder.explain.patching import decoder_attributions
from rldecoder.explain.positions import positions_from_cache
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.schemas import Scalar
from rldecoder.seeds import derive_seed, seed_everything, torch_generator
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import EvaluateInputs

SOURCES: dict[Source, str] = {
    "comparison": Evaluation.stage,
    "sae": SaeGate.stage,
    "labels": Labels.stage,
    "importance": Importance.stage,
    "controls": Controls.stage,
    "claims": TrainedExplainer.stage,
}
"""Who publishes what the targets are measured with."""


def run(inputs: EvaluateInputs, config: EvaluateConfig, ctx: StageContext) -> Output:
    """Measure everything, then fill the targets."""
    seed_everything(ctx.seed)
    lm = inputs.model.load(ctx.device)
    sae = inputs.sae.load(ctx.device)
    decoders = {SUPERVISED: inputs.supervised.load(lm, sae), RL: inputs.policy.load(lm, sae)}

    prompts, missing = _prompts(lm, config, ctx)
    answers = _answer_tasks(lm, decoders, prompts, inputs, config, ctx)
    scores = score_tasks(answers, config.bootstrap_resamples, ctx.seed)
    Evaluation.tasks.save_rows(ctx.out, [score.model_dump() for score in scores])
    Evaluation.answers.save_rows(ctx.out, [answer._asdict() for answer in answers])
    harness = _harness(inputs, lm, sae, decoders, prompts, scores, config.harness, ctx)
    if harness is not None:
        harness.save(Evaluation.harness.path(ctx.out))

    faithfulness = FaithfulnessTable(
        {
            split: _faithfulness(split, lm, decoders, inputs, config, ctx)
            for split in ("test", "ood")
        }
    )
    Evaluation.faithfulness.save(ctx.out, faithfulness)

    # Explanations are about the decoder that is published, whichever it is.
    final = _final(inputs)
    interpretability = _interpretability(inputs, decoders[final], config, ctx)
    Evaluation.interpretability.save(ctx.out, interpretability)
    targets = fill_targets(
        _measurements(inputs, scores, faithfulness, interpretability, final), SOURCES
    )
    Evaluation.targets.save(ctx.out, targets)

    metrics: dict[str, Scalar] = dict(targets.headline)
    for model in (SUPERVISED, RL):
        metrics[f"{model}_kl"] = faithfulness["test"][model].kl
        metrics[f"{model}_agreement"] = faithfulness["test"][model].agreement
    metrics |= {f"{score.task}_{score.model}": score.score for score in scores}
    for one in () if harness is None else harness.scores:
        counted = one.metric if one.filter == "none" else f"{one.metric}_{one.filter}"
        metrics[f"lm_eval_{one.task}_{counted}_{one.system}"] = one.value
    reasons = (f"task files not found: {', '.join(missing)}",) if missing else ()
    return Output(metrics, reasons=reasons)


def _models(inputs: EvaluateInputs) -> dict[str, Any]:
    """Where workers find what is compared."""
    return {
        "model": inputs.model.model.absolute(),
        "record": ModelFolder.record.path(inputs.model.folder).absolute(),
        "sae": inputs.sae.sae.absolute(),
        "decoders": {
            SUPERVISED: inputs.supervised.decoder.absolute(),
            RL: inputs.policy.decoder.absolute(),
        },
    }


def _final(inputs: EvaluateInputs) -> str:
    """Which of the decoders is the published one."""
    return SUPERVISED if inputs.final.freeze.which == "supervised" else RL


def _faithfulness(
    split: str,
    lm: FrozenLM,
    decoders: Mapping[str, SaeDecoderForCausalLM],
    inputs: EvaluateInputs,
    config: EvaluateConfig,
    ctx: StageContext,
) -> dict[str, Faithfulness]:
    """Both decoders on the same tokens of a split."""
    predictors = {name: decoder_predictor(decoder) for name, decoder in decoders.items()}
    read = (inputs.model, inputs.sae, inputs.cache, inputs.supervised, inputs.policy)
    settings = FaithfulnessSettings(
        **_models(inputs),
        cache=inputs.cache.folder.absolute(),
        name=split,
        precision=config.matmul_precision,
        ends=batch_ends(inputs.cache.reader(split), config.num_tokens),
    )
    shards = ctx.shards.results(
        FaithfulnessWorker, settings, [artifact.folder for artifact in read], "faithfulness",
        f"faithfulness on {split}",
        here=FaithfulnessWorker(settings, ctx.device, ctx.report.note, (lm, predictors)),
    )  # fmt: skip
    return summarise(shards, derive_seed(ctx.seed, "bootstrap"))


def _prompts(
    lm: FrozenLM, config: EvaluateConfig, ctx: StageContext
) -> tuple[dict[str, list[TaskPrompt]], list[str]]:
    """Prompts of the generated tasks and of the files that are here; names of missing ones."""
    present = [task for task in config.file_tasks if task.path.is_file()]
    missing = [task.name for task in config.file_tasks if task not in present]
    suite = TaskSuite(config.tasks, present, lm)
    for note in suite.notes:
        ctx.report.note(note)
    prompts = {
        name: suite.make(
            name,
            "test",
            config.num_prompts,
            derive_seed(ctx.seed, "prompts", name),
            fewer=True,
        )
        for name in suite.names
    }
    check_lengths(lm, [prompt for asked in prompts.values() for prompt in asked])
    return prompts, missing


def _answer_tasks(
    lm: FrozenLM,
    decoders: Mapping[str, SaeDecoderForCausalLM],
    asked: Mapping[str, Sequence[TaskPrompt]],
    inputs: EvaluateInputs,
    config: EvaluateConfig,
    ctx: StageContext,
) -> list[Answer]:
    """Every model's answers to the tasks."""
    # All answer the same prompts in the same order: drops are paired.
    prompts = tuple(prompt for one in asked.values() for prompt in one)
    settings = AnswerSettings(**_models(inputs), prompts=prompts, batch_size=config.batch_size)
    read = (inputs.model, inputs.sae, inputs.supervised, inputs.policy)
    shards = ctx.shards.results(
        AnswerWorker, settings, [artifact.folder for artifact in read], "answers", "tasks",
        here=AnswerWorker(settings, ctx.device, ctx.report.note, (lm, decoders)),
    )  # fmt: skip
    return [
        Answer(row.task, shard.system, row.prompt_index, row.answer, row.completion, row.score)
        for shard, rows in zip(settings.asked(), shards, strict=True)
        for row in rows
    ]


def _harness(
    inputs: EvaluateInputs,
    lm: FrozenLM,
    sae: Sae,
    decoders: Mapping[str, SaeDecoderForCausalLM],
    prompts: Mapping[str, list[TaskPrompt]],
    scores: Sequence[TaskScore],
    config: HarnessConfig | None,
    ctx: StageContext,
) -> HarnessScores | None:
    """What lm-evaluation-harness finds, our scores of the same prompts beside; None unasked."""
    if config is None:
        return None
    from rldecoder.evals.harness import ask_harness  # an extra

    systems = {FROZEN: frozen_system(lm)}
    if config.spliced:
        systems["spliced"] = spliced_system(lm, sae, inputs.cache.meta.hook_layer)
    systems |= {name: decoder_system(lm, decoder) for name, decoder in decoders.items()}

    # Tasks are files to the harness, and nothing that is to be kept.
    named = {name.removesuffix("_choices") for name in config.tasks}
    own = {name: asked for name, asked in prompts.items() if name in named}
    with TemporaryDirectory() as folder, ctx.report.track("harness", len(systems), "models") as bar:
        found = ask_harness(
            lm, systems, config.tasks, own, Path(folder), config.include,
            limit=config.limit, batch_size=config.batch_size,
            say=lambda text: bar.advance(1, text),
        )  # fmt: skip

    # With a limit it sees other prompts than ours.
    ours = {(score.task, score.model): score.score for score in scores}
    counted = beside_ours(found.scores, {} if config.limit is not None else ours)
    return found.model_copy(update={"scores": tuple(counted)})


def _interpretability(
    inputs: EvaluateInputs,
    decoder: SaeDecoderForCausalLM,
    config: EvaluateConfig,
    ctx: StageContext,
) -> Interpretability:
    """Label coverage, importance mass, and how faithful feature rankings and claims are."""
    positions = positions_from_cache(
        inputs.cache.reader("test"),
        decoder,
        config.deletion_positions,
        derive_seed(ctx.seed, "deletion"),
    )
    latents = positions.latents
    attributions = decoder_attributions(decoder, positions.places)

    # Method A ranks by what is usual for a latent, which the explainer has measured.
    scales = inputs.explainer.load(ctx.device).scales[latents.indices]
    normalised = torch.where(scales > 0, latents.acts / scales.clamp_min(1e-9), 0.0)
    orders = ranking_orders(latents, attributions, normalised, torch_generator(ctx.seed, "lot"))
    with ctx.report.track("deletion", 1, "benchmarks") as bar:
        deletion = deletion_benchmark(
            decoder,
            positions.places,
            orders,
            resamples=config.bootstrap_resamples,
            seed=ctx.seed,
        )
        bar.advance()
    return Interpretability(
        label_coverage=label_coverage(
            [feature.high_confidence for feature in inputs.labels.labels.features]
        ),
        importance_mass=inputs.importance.mass,
        deletion=deletion,
        claims=inputs.explainer.evaluation,
    )


def _measurements(
    inputs: EvaluateInputs,
    scores: list[TaskScore],
    faithfulness: FaithfulnessTable,
    interpretability: Interpretability,
    final: str,
) -> dict[str, Measurement]:
    """The values of the targets, with the thresholds that this run's own gates used."""
    test, ood = faithfulness["test"], faithfulness["ood"]
    freeze, claims = inputs.final.config, interpretability.claims
    final_note = f"the published final decoder is the {inputs.final.freeze.which} one"
    return {
        "kl_supervised": Measurement(
            test[SUPERVISED].kl, "", inputs.decoder_gate.config.get("max_kl")
        ),
        "kl_rl": Measurement(test[RL].kl, final_note, freeze.get("max_kl")),
        "task_drop": plan_values.task_drop(scores, freeze.get("max_task_drop")),
        "ood_ratio": plan_values.ood_ratio(test[final], ood[final]),
        "agreement": Measurement(test[final].agreement, final_note),
        "label_coverage": plan_values.coverage(interpretability.label_coverage["all"]),
        "top10_mass": plan_values.top10_mass(interpretability.importance_mass),
        "controls": Measurement(float(inputs.controls.verdict == "pass")),
        "claims": plan_values.ahead_of_method_a(claims),
        "claim_precision": plan_values.claim_precision(claims),
        "simulatability": plan_values.simulatability(claims),
        **plan_values.sae_values(inputs.sae_gate.report),
    }

"""From published artifacts to the report's data: tables, words, figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import Controls, Evaluation
from rldecoder.dashboard import collect
from rldecoder.dashboard.build_figures import ALL_TASKS, MODEL_NAMES, build_figures
from rldecoder.dashboard.cards import feature_cards
from rldecoder.dashboard.claims import (
    precision_columns,
    precision_note,
    precision_rows,
    simulation_columns,
    simulation_note,
    simulation_rows,
)
from rldecoder.dashboard.label_table import imported_rows, label_columns, label_rows
from rldecoder.dashboard.opening import five_sentences
from rldecoder.dashboard.report import (
    ControlsShown,
    Fact,
    FaithfulnessRow,
    HarnessShown,
    ReportData,
)
from rldecoder.dashboard.shown import ExampleShown
from rldecoder.evals.comparison import RL, SUPERVISED, FaithfulnessTable, TaskScore
from rldecoder.evals.harness_scores import HarnessScores, Score
from rldecoder.evals.targets import TargetRow
from rldecoder.rl.freeze import Freeze
from rldecoder.schemas import JsonRecord, Scalar, optional
from rldecoder.visible_text import visible_text

if TYPE_CHECKING:
    from rldecoder.stages.inputs import ReportInputs


def build_report(inputs: ReportInputs, *, title: str, max_features: int) -> ReportData:
    """Gather everything that the page shows."""
    claims = inputs.evaluation.interpretability.claims
    tasks = [
        TaskScore.model_validate(row | {"model": MODEL_NAMES[row["model"]]})
        for row in inputs.evaluation.tasks.to_pylist()
    ]

    # In the order of the page.
    return ReportData(
        title=visible_text(title, 120),
        subtitle=_subtitle(inputs),
        opening=five_sentences(inputs),
        facts=_facts(inputs),
        caveats=collect.caveats(inputs),
        targets=[
            row.model_copy(update={"note": visible_text(row.note, 400)})
            for row in inputs.evaluation.targets.root
        ],
        pipeline=collect.pipeline(inputs),
        faithfulness=_faithfulness_rows(inputs.evaluation.faithfulness),
        tasks=tasks,
        freeze_note=freeze_note(inputs.final.freeze),
        controls=controls_table(inputs.controls, inputs.evaluation.faithfulness),
        harness=harness_table(inputs.evaluation.harness),
        label_columns=label_columns(),
        label_methods=label_rows(inputs.labels.controls) + imported_rows(inputs.labels.imported),
        claim_columns=precision_columns(),
        claim_methods=precision_rows(claims),
        claim_note=precision_note(claims),
        simulation_columns=simulation_columns(),
        simulation_rows=simulation_rows(claims),
        simulation_note=simulation_note(claims),
        examples=[ExampleShown.of(example) for example in inputs.explainer.examples.root],
        features=feature_cards(inputs.labels, inputs.clusters, max_features=max_features),
        configs=collect.config_rows(inputs),
        figures=build_figures(inputs, tasks),
    )


class StageSummary(JsonRecord):
    """What a stage came to."""

    digest: str
    verdict: str | None
    metrics: dict[str, Scalar]
    """Headline numbers but for times and sizes, which differ from run to run."""


class Summary(JsonRecord):
    """`summary.json`: what the page says in numbers, without times."""

    title: str
    targets: tuple[TargetRow, ...]
    caveats: tuple[str, ...]
    faithfulness: tuple[FaithfulnessRow, ...]
    tasks: tuple[TaskScore, ...]
    harness: HarnessScores | None = optional()
    """What lm-evaluation-harness found, where it was asked."""
    stages: dict[str, StageSummary]


def summary(data: ReportData, artifacts: Sequence[Artifact]) -> Summary:
    """The page's numbers."""
    (evaluation,) = (one for one in artifacts if isinstance(one, Evaluation))
    return Summary(
        title=data.title,
        targets=tuple(data.targets),
        caveats=tuple(data.caveats),
        faithfulness=tuple(data.faithfulness),
        tasks=tuple(data.tasks),
        harness=evaluation.harness,
        stages={
            artifact.stage: StageSummary(
                digest=artifact.digest,
                verdict=artifact.verdict,
                metrics={
                    key: value
                    for key, value in artifact.metrics.items()
                    if not key.endswith(collect.WALL_SUFFIXES)
                },
            )
            for artifact in artifacts
        },
    )


def _subtitle(inputs: ReportInputs) -> str:
    meta = inputs.cache.meta
    name = visible_text(inputs.model.record.name or meta.model_name, 80)
    return f"{name}, hook layer {meta.hook_layer} of {meta.num_layers}, {_sae_words(inputs)}."


def _sae_words(inputs: ReportInputs) -> str:
    """Which SAE it is, and on what it was trained."""
    source = inputs.sae.source
    if source is not None:
        of = visible_text(source.model_name, 80) or "a model that it does not name"
        return f"pretrained {source.architecture} SAE of {of}, {visible_text(source.hook_name, 80)}"
    tokens = inputs.cache.meta.tokens.get("train")
    trained = f", SAE trained on {tokens:,} cached tokens" if tokens else ""
    return f"{inputs.sae.config.get('architecture', '')} SAE{trained}"


def _facts(inputs: ReportInputs) -> list[Fact]:
    targets, test = inputs.evaluation.targets, inputs.evaluation.faithfulness["test"]
    coverage = inputs.evaluation.interpretability.label_coverage["all"]
    met = sum(row.met is True for row in targets.root)
    unknown = sum(row.met is None for row in targets.root)
    wall = sum(artifact.wall_seconds for artifact in inputs)

    def share(key: str) -> str:
        value = targets[key].value
        return "–" if value is None else f"{100 * value:.0f} %"

    return [
        Fact(
            "targets met", f"{met} of {len(targets.root)}", f"{unknown} unknown" if unknown else ""
        ),
        Fact("KL, supervised", f"{test[SUPERVISED].kl:.2f}", "nats/token"),
        Fact("KL, after RL", f"{test[RL].kl:.2f}", "nats/token"),
        Fact("agreement", share("agreement"), "first choice"),
        Fact("SAE variance explained", share("explained_variance")),
        Fact(
            "labels sure",
            share("label_coverage"),
            f"Wilson 95 %: {100 * coverage.low:.0f} to {100 * coverage.high:.0f} %, "
            f"of {coverage.features}",
        ),
        Fact("wall time", collect.format_seconds(wall), "all stages"),
    ]


def _two_measurements(rows: Sequence[Sequence[str]], faithfulness: FaithfulnessTable | None) -> str:
    """Why KL and task scores of one decoder stand on the page with two values."""
    if not rows or faithfulness is None or RL not in faithfulness["test"]:
        return ""
    tokens = faithfulness["test"][RL].num_tokens
    return (
        f"Measured by control_ppo on {rows[0][3]} prompts and its own, smaller part of the test "
        "text, the same for every system. Scores and KL of the same decoders in the targets and "
        f"under Faithfulness are evaluate's, on other prompts and {tokens:,} tokens: they differ "
        "by the sample, not by the decoder."
    )


def _faithfulness_rows(faithfulness: FaithfulnessTable) -> list[FaithfulnessRow]:
    return [
        FaithfulnessRow(model=shown, split=split, **dict(by_model[model]))
        for split, by_model in (("test", faithfulness["test"]), ("ood", faithfulness["ood"]))
        for model, shown in MODEL_NAMES.items()
        if model in by_model
    ]


def freeze_note(freeze: Freeze) -> str:
    """Which decoder is final, and whether it is good enough to be called frozen."""
    which = {"ppo": "the RL decoder", "supervised": "the supervised decoder"}[freeze.which]
    seeds = ""
    if freeze.num_trainings is not None:
        seeds = f" Of {freeze.num_trainings} trainings {freeze.num_frozen} would be by themselves."
    if freeze.frozen:
        return (
            f"Frozen: {which} is final. On PPO's tasks it scores {freeze.drop_in_words()}.{seeds}"
        )
    reasons = "; ".join(visible_text(reason, 300) for reason in freeze.reasons)
    return (
        f"Not frozen. {which[0].upper()}{which[1:]} is published as final, because {reasons}."
        f"{seeds}"
    )


def controls_table(
    controls: Controls, faithfulness: FaithfulnessTable | None = None
) -> ControlsShown:
    """PPO beside its controls: columns, rows, verdict, reasons."""
    shown = [
        (
            row["system"].replace("_", " ") + (" (control)" if row["gates"] else ""),
            f"{row['score']:.3f}",
            f"{row['score_low']:.3f} – {row['score_high']:.3f}",
            f"{row['num_prompts']}",
            f"{row['kl']:.3f}",
            f"{row['kl_low']:.3f} – {row['kl_high']:.3f}",
        )
        for row in controls.systems.to_pylist()
        if row["task"] == ALL_TASKS
    ]
    verdict = controls.record
    return ControlsShown(
        columns=("system", "task score", "95 %", "prompts", "KL, nats/token", "95 %"),
        rows=shown,
        verdict=verdict.verdict,
        measured_on=_two_measurements(shown, faithfulness),
        reasons="; ".join(
            visible_text(reason, 300) for reason in (*verdict.reasons, *verdict.beside)
        ),
    )


def harness_table(found: HarnessScores | None) -> HarnessShown | None:
    """What lm-evaluation-harness found: columns, rows, its version; None where it was not asked."""
    if found is None:
        return None
    return HarnessShown(
        columns=(
            "task", "metric", "model", "documents", "value", "± standard error", "to frozen",
            "± paired", "ours",
        ),
        rows=[_harness_row(one) for one in found.scores],
        version=visible_text(found.harness, 40),
    )  # fmt: skip


def _harness_row(one: Score) -> Sequence[str]:
    def shown(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.3f}"

    return (
        visible_text(one.task, 80), visible_text(one.counted, 80), one.system, str(one.n),
        shown(one.value), shown(one.stderr), shown(one.delta, "+"), shown(one.delta_stderr),
        shown(one.ours),
    )  # fmt: skip

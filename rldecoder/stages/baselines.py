"""The frozen model by itself: next-token quality, lenses per layer, verifiable tasks.

Everything later is measured against these numbers, and the decoder starts from the affine lens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from rldecoder.artifacts.catalogue import Baselines, ModelFolder
from rldecoder.config.data import BaselinesConfig
from rldecoder.data.shards import SplitSequences
from rldecoder.evals.baseline_shards import (
    BaselineSettings,
    BaselineWorker,
    LensMaps,
    Spent,
    Tensors,
    plan_parts,
    read_answers,
    read_jacobians,
    read_moments,
    read_predictions,
    resolve_layers,
    save_lenses,
    task_prompts,
)
from rldecoder.evals.prompts import TASKS, TaskPrompt
from rldecoder.evals.tasks import TaskResult, summarise
from rldecoder.executors.stage_shards import OpenShards
from rldecoder.figures import svg_figure
from rldecoder.lm.baselines import (
    BaselineRecord,
    JacobianFit,
    LayerLenses,
    LensQuality,
    NextToken,
    TaskScore,
    Timing,
)
from rldecoder.lm.jacobian import JacobianMap
from rldecoder.lm.lens import PredictionMeans, choose_affine
from rldecoder.schemas import Scalar
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import TextInputs


def run(inputs: TextInputs, config: BaselinesConfig, ctx: StageContext) -> Output:
    """Publish the numbers, the lenses' table and figure, and the affine lenses themselves."""
    corpus = inputs.corpus.folder
    held_out = ["test"] + (["ood"] if any(corpus.glob("ood-*.parquet")) else [])
    budgets = {"train": config.fit_tokens, "validation": config.validation_tokens}
    budgets |= dict.fromkeys(held_out, config.eval_tokens)
    texts = {split: SplitSequences(corpus, split) for split in budgets}
    length = texts["train"].length
    sequences = {
        split: min(max(1, budget // length), texts[split].num_sequences)
        for split, budget in budgets.items()
    }
    settings = BaselineSettings(
        model=inputs.model.model.absolute(),
        record=ModelFolder.record.path(inputs.model.folder).absolute(),
        corpus=corpus.absolute(),
        lenses=(ctx.progress / "lenses.safetensors").absolute(),
        config=config,
        seed=ctx.seed,
        fit_sequences=sequences["train"],
        parts=tuple(plan_parts(config, sequences, held_out, length)),
    )

    reads = [inputs.model.folder, corpus]
    with ctx.shards.opened(BaselineWorker, settings, reads, "baselines") as shards:
        # Lenses are fitted without the text that they are measured on.
        lenses = _fit(shards, settings, ctx)
        save_lenses(settings.lenses, lenses)
        metrics = _measure(shards, settings, held_out)
        tasks = _run_tasks(shards, settings)
        spent = Spent.of(map(shards.read, range(len(settings.parts))))

    layers = list(lenses)
    rows = [
        {"layer": layer, "lens": lens, "split": split, **by_name[f"{lens}.{layer}"]._asdict()}
        for split, by_name in metrics.items()
        for lens in lenses[layers[0]].kinds
        for layer in layers
    ]
    Baselines.lens.save_rows(ctx.out, rows)
    _lens_figure(lenses, metrics, Baselines.lens_figure.path(ctx.out))
    tensors = {f"A.{layer}": lens.affine.A for layer, lens in lenses.items()}
    tensors |= {f"c.{layer}": lens.affine.c for layer, lens in lenses.items()}
    _save(tensors, Baselines.affine_lens.path(ctx.out))
    maps = {f"J.{layer}": one.jacobian.J for layer, one in lenses.items() if one.jacobian}
    if maps:
        _save(maps, Baselines.jacobian_lens.path(ctx.out))

    # What depends on the machine stands apart: all other files are the same on every run.
    tokens = {split: count * length for split, count in sequences.items()}
    record = _record(inputs.model.record.name, tokens, lenses, metrics, tasks)
    Baselines.record.save(ctx.out, record)
    timing = Timing(
        tokens_per_second=spent.tokens / spent.seconds,
        peak_memory_bytes=int(spent.peak_memory_bytes),
    )
    Baselines.timing.save(ctx.out, timing)
    return Output(_headline(lenses, metrics, tasks) | timing.headline)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _fit(
    shards: OpenShards[Tensors], settings: BaselineSettings, ctx: StageContext
) -> dict[int, LensMaps]:
    """Lenses per layer: fitted on `train`, the ridge strength chosen on `validation`."""
    config = settings.config
    layers = resolve_layers(config.lens_layers, shards.crew.facts["num_layers"])
    jacobians: Mapping[int, JacobianMap] = {}
    if config.jacobian_positions:
        parts = shards.results(settings.of_kind("jacobian"), "Jacobian lens", "positions")
        found = read_jacobians(parts, layers, config.jacobian_positions)
        if isinstance(found, str):
            ctx.report.note(f"The Jacobian lens is left out: {found}.")
        else:
            jacobians = found

    # One split after the other, each term added to those before it.
    sums = shards.results(settings.of_kind("moments"), "baselines, fit", "tokens")
    train = settings.of_kind("moments", "train")
    fitted = read_moments(islice(sums, len(train)), layers)
    held_out = read_moments(sums, layers)
    return {
        layer: LensMaps(
            choose_affine(fitted[layer], held_out[layer], config.ridge_strengths),
            jacobians.get(layer),
        )
        for layer in layers
    }


def _measure(
    shards: OpenShards[Tensors], settings: BaselineSettings, held_out: Sequence[str]
) -> dict[str, dict[str, PredictionMeans]]:
    """Metrics by split: of the frozen model ("frozen") and of each lens ("logit.8", ...)."""
    parts = shards.results(settings.of_kind("predictions"), "baselines, measure", "tokens")
    metrics = {}
    for split in held_out:
        own = islice(parts, len(settings.of_kind("predictions", split)))
        metrics[split] = {name: sums.means() for name, sums in read_predictions(own).items()}
    return metrics


class TaskBaseline(NamedTuple):
    """One task's result."""

    result: TaskResult
    working_right: float | None
    """Addition: share of completions whose shown working is right; None for other tasks."""


def _run_tasks(shards: OpenShards[Tensors], settings: BaselineSettings) -> dict[str, TaskBaseline]:
    """Results by task."""
    numbers = settings.of_kind("task")
    if not numbers:
        return {}
    results: dict[str, TaskBaseline] = {}
    parts = shards.results(numbers, "tasks", "prompts")
    for task in TASKS:
        rows = read_answers(islice(parts, len(settings.of_kind("task", task))))
        working = None
        if task == "addition":
            asked = task_prompts(task, settings.config, settings.seed)
            right = [
                working_is_right(prompt, row.completion)
                for prompt, row in zip(asked, rows, strict=True)
            ]
            working = sum(right) / len(right)
        results[task] = TaskBaseline(summarise(rows), working)
    return results


def working_is_right(prompt: TaskPrompt, completion: str) -> bool:
    """Whether an addition's first line shows "a + b = c" with the question's numbers, c correct.

    The final answer is not looked at: a right answer after a wrong working is no reasoning.
    """
    asked = re.findall(r"(\d+) \+ (\d+)", prompt.prompt)[-1]
    shown = re.search(r"(\d+)\s*\+\s*(\d+)\s*=\s*(\d+)", completion.lstrip("\n").split("\n", 1)[0])
    if shown is None:
        return False
    a, b, total = map(int, shown.groups())
    return sorted((a, b)) == sorted(map(int, asked)) and a + b == total


def _lens_figure(
    lenses: Mapping[int, LensMaps], metrics: Mapping[str, Mapping[str, PredictionMeans]], path: Path
) -> None:
    """KL and agreement per layer."""
    layers = list(lenses)
    colours = {"logit": "tab:orange", "affine": "tab:blue", "jacobian": "tab:green"}
    kinds = lenses[layers[0]].kinds
    labels = {
        "kl": "KL(frozen || lens), nats per token",
        "agreement": "agreement with the final layer",
    }
    with svg_figure(path, (8, 3.2), font_size=10) as figure:
        for axes, (field, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
            for lens in kinds:
                for split, style in zip(metrics, ("-", "--"), strict=False):
                    values = [getattr(metrics[split][f"{lens}.{layer}"], field) for layer in layers]
                    axes.plot(
                        layers, values, style,
                        marker="o", color=colours[lens], label=f"{lens} lens, {split}",
                    )  # fmt: skip
            axes.set(xlabel="layer", ylabel=label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def _record(
    model_name: str,
    tokens: Mapping[str, int],
    lenses: Mapping[int, LensMaps],
    metrics: Mapping[str, Mapping[str, PredictionMeans]],
    tasks: Mapping[str, TaskBaseline],
) -> BaselineRecord:
    # Fields are named after lens and split; the out-of-domain split may be absent.
    qualities = {
        layer: {
            f"{kind}_{split}": LensQuality(**by_name[f"{kind}.{layer}"]._asdict())
            for kind in lens.kinds
            for split, by_name in metrics.items()
        }
        for layer, lens in lenses.items()
    }
    known = {
        layer: JacobianFit(
            positions=lens.jacobian.positions, relative_error=lens.jacobian.relative_error
        )
        for layer, lens in lenses.items()
        if lens.jacobian is not None
    }

    return BaselineRecord(
        model=model_name,
        tokens=dict(tokens),
        frozen={
            split: NextToken(accuracy=m["frozen"].accuracy, ce_nats=m["frozen"].ce)
            for split, m in metrics.items()
        },
        lenses={
            layer: LayerLenses(
                ridge_strength=lens.affine.strength, jacobian=known.get(layer), **qualities[layer]
            )
            for layer, lens in lenses.items()
        },
        tasks={
            task: TaskScore(
                score=baseline.result.score,
                ci95=(baseline.result.ci_low, baseline.result.ci_high),
                prompts=baseline.result.n,
                shown_working_right=baseline.working_right,
            )
            for task, baseline in tasks.items()
        },
    )


def _headline(
    lenses: Mapping[int, LensMaps],
    metrics: Mapping[str, Mapping[str, PredictionMeans]],
    tasks: Mapping[str, TaskBaseline],
) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    for split, by_name in metrics.items():
        values[f"accuracy_{split}"] = by_name["frozen"].accuracy
        values[f"ce_{split}"] = by_name["frozen"].ce
    for kind in ("affine", "jacobian"):
        for layer, lens in lenses.items():
            if kind in lens.kinds:
                values[f"{kind}_kl_{layer}"] = metrics["test"][f"{kind}.{layer}"].kl
    for task, baseline in tasks.items():
        values[f"score_{task}"] = baseline.result.score
        if baseline.working_right is not None:
            values["shown_working_right"] = baseline.working_right
    return values

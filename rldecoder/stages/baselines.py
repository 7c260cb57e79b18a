"""The frozen model by itself: next-token quality, lenses per layer, verifiable tasks.

Everything later is measured against these numbers, and the decoder starts from the affine lens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from rldecoder.artifacts.catalogue import Baselines
from rldecoder.config.data import BaselinesConfig
from rldecoder.data.shards import first_sequences
from rldecoder.errors import BadInputError
from rldecoder.evals.generation import prefix_generate
from rldecoder.evals.prompts import TASKS, TaskPrompt, make_prompts
from rldecoder.evals.suite import check_lengths
from rldecoder.evals.tasks import TaskResult, run_task
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
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.jacobian import JacobianMap, draw_contexts, fit_jacobians, obstacle
from rldecoder.lm.lens import (
    AffineMap,
    Moments,
    PredictionMeans,
    PredictionSums,
    choose_affine,
    compare_predictions,
    logit_lens,
)
from rldecoder.lm.sinks import SKIP_FIRST, is_sink
from rldecoder.provenance import peak_memory_bytes
from rldecoder.reporting import Bar
from rldecoder.schemas import Scalar
from rldecoder.seeds import torch_generator
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import TextInputs


class LensMaps(NamedTuple):
    """What was fitted for one layer; the logit lens needs no fit."""

    affine: AffineMap
    jacobian: JacobianMap | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The lenses that there are."""
        return ("logit", "affine") if self.jacobian is None else ("logit", "affine", "jacobian")

    def predict(self, kind: str, lm: FrozenLM, resid: Tensor) -> Tensor:
        """The final hidden state [B, T, D] that a lens reads from residuals [B, T, D]."""
        if kind == "jacobian" and self.jacobian is not None:
            return self.jacobian(lm, resid)
        return logit_lens(lm, resid) if kind == "logit" else self.affine(resid)


class Residuals(NamedTuple):
    """One micro-batch through the frozen model, first positions left out."""

    by_layer: dict[int, Tensor]
    """Layer to residual stream [B, T - 1, D]."""
    final_hidden: Tensor
    """[B, T - 1, D]"""
    input_ids: Tensor
    """[B, T - 1]"""


class _Body:
    """Forward passes over sequences, timed."""

    def __init__(self, lm: FrozenLM, layers: Sequence[int], micro_batch: int) -> None:
        self.lm, self.layers, self._micro_batch = lm, layers, micro_batch
        self.num_tokens, self.seconds = 0, 0.0

    def over(self, input_ids: Tensor, bar: Bar) -> Iterator[Residuals]:
        """Residuals of the layers for sequences [B, T], micro-batch by micro-batch."""
        for ids in input_ids.split(self._micro_batch):
            started = time.perf_counter()
            seen, final = self.lm.residuals(ids.to(self.lm.device))
            self.seconds += time.perf_counter() - started
            self.num_tokens += ids.numel()
            kept = {layer: seen[layer][:, SKIP_FIRST:] for layer in self.layers}
            yield Residuals(kept, final[:, SKIP_FIRST:], ids[:, SKIP_FIRST:].to(self.lm.device))
            bar.advance(ids.numel())


def run(inputs: TextInputs, config: BaselinesConfig, ctx: StageContext) -> Output:
    """Publish the numbers, the lenses' table and figure, and the affine lenses themselves."""
    corpus = inputs.corpus.folder
    held_out = ["test"] + (["ood"] if any(corpus.glob("ood-*.parquet")) else [])
    budgets = {"train": config.fit_tokens, "validation": config.validation_tokens}
    budgets |= dict.fromkeys(held_out, config.eval_tokens)
    tokens = {split: first_sequences(corpus, split, budget) for split, budget in budgets.items()}

    # Lenses are fitted without the text that they are measured on.
    lm = inputs.model.load(ctx.device)
    layers = _resolve_layers(config.lens_layers, lm.num_layers)
    body = _Body(lm, layers, config.micro_batch_sequences)

    total = sum(ids.numel() for ids in tokens.values())
    jacobians = _jacobians(lm, layers, tokens["train"], config.jacobian_positions, ctx)
    with ctx.report.track("baselines", total, unit="tokens") as bar:
        affine = _fit(body, tokens["train"], tokens["validation"], config, bar)
        lenses = {layer: LensMaps(affine[layer], jacobians.get(layer)) for layer in layers}
        metrics = {
            split: _evaluate(body, lenses, tokens[split], config.chunk_tokens, bar)
            for split in held_out
        }
    tasks = _run_tasks(lm, config, ctx)

    rows = [
        {"layer": layer, "lens": lens, "split": split, **by_name[f"{lens}.{layer}"]._asdict()}
        for split, by_name in metrics.items()
        for lens in lenses[layers[0]].kinds
        for layer in layers
    ]
    Baselines.lens.save_rows(ctx.out, rows)
    _lens_figure(lenses, metrics, Baselines.lens_figure.path(ctx.out))
    tensors = {f"A.{layer}": lens.A for layer, lens in affine.items()}
    tensors |= {f"c.{layer}": lens.c for layer, lens in affine.items()}
    _save(tensors, Baselines.affine_lens.path(ctx.out))
    if jacobians:
        maps = {f"J.{layer}": lens.J for layer, lens in jacobians.items()}
        _save(maps, Baselines.jacobian_lens.path(ctx.out))

    # What depends on the machine stands apart: all other files are the same on every run.
    record = _record(inputs.model.record.name, tokens, lenses, metrics, tasks)
    Baselines.record.save(ctx.out, record)
    timing = Timing(
        tokens_per_second=body.num_tokens / body.seconds,
        peak_memory_bytes=peak_memory_bytes(ctx.device),
    )
    Baselines.timing.save(ctx.out, timing)
    return Output(_headline(lenses, metrics, tasks) | timing.headline)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _resolve_layers(configured: tuple[int, ...] | str, num_layers: int) -> list[int]:
    if isinstance(configured, str):
        return list(range(num_layers))
    if not configured or max(configured) > num_layers:
        raise BadInputError(
            f"`baselines.lens_layers` is {list(configured)}.",
            f"The model has {num_layers} blocks; layers run from 0 (embeddings) to {num_layers}.",
            "Name layers in that range, among them the hook layer, or `all`.",
        )
    return sorted(set(configured))


def _fit(
    body: _Body, train: Tensor, validation: Tensor, config: BaselinesConfig, bar: Bar
) -> dict[int, AffineMap]:
    """Affine lens per layer: fitted on `train`, ridge strength chosen on `validation`."""
    sums = []
    for ids in (train, validation):
        moments = {layer: Moments(body.lm.d_model, body.lm.device) for layer in body.layers}
        for batch in body.over(ids, bar):
            final = batch.final_hidden.flatten(0, 1)
            for layer, resid in batch.by_layer.items():
                flat = resid.flatten(0, 1)
                usual = ~is_sink(flat, batch.input_ids.flatten(), body.lm.front)
                moments[layer].add(flat[usual], final[usual])
        sums.append(moments)
    fitted, held_out = sums
    return {
        layer: choose_affine(fitted[layer], held_out[layer], config.ridge_strengths)
        for layer in body.layers
    }


def _jacobians(
    lm: FrozenLM, layers: Sequence[int], train: Tensor, positions: int, ctx: StageContext
) -> dict[int, JacobianMap]:
    """The Jacobian lens per layer; nothing where none is asked for or can be had."""
    if positions == 0:
        return {}
    why = obstacle(lm, min(layers))
    if why is not None:
        ctx.report.note(f"The Jacobian lens is left out: {why}.")
        return {}
    contexts = draw_contexts(train, positions, torch_generator(ctx.seed, "jacobian"), lm.front)
    with ctx.report.track("Jacobian lens", positions * lm.d_model, unit="rows") as bar:
        return fit_jacobians(lm, layers, contexts, bar)


def _evaluate(
    body: _Body, lenses: Mapping[int, LensMaps], ids: Tensor, chunk_tokens: int, bar: Bar
) -> dict[str, PredictionMeans]:
    """Metrics of the frozen model ("frozen") and of each lens ("logit.8", "affine.8", ...).

    The last position of a sequence has no next token and is left out.
    """
    sums = {"frozen": PredictionSums()}
    for layer, lens in lenses.items():
        sums |= {f"{kind}.{layer}": PredictionSums() for kind in lens.kinds}
    for batch in body.over(ids, bar):
        predicted = {
            f"{kind}.{layer}": lens.predict(kind, body.lm, batch.by_layer[layer][:, :-1]).flatten(
                0, 1
            )
            for layer, lens in lenses.items()
            for kind in lens.kinds
        }
        compare_predictions(
            body.lm,
            batch.final_hidden[:, :-1].flatten(0, 1),
            predicted,
            batch.input_ids[:, 1:].flatten(),
            sums,
            chunk_tokens,
        )
    return {name: total.means() for name, total in sums.items()}


class TaskBaseline(NamedTuple):
    """One task's result."""

    result: TaskResult
    working_right: float | None
    """Addition: share of completions whose shown working is right; None for other tasks."""


def _run_tasks(lm: FrozenLM, config: BaselinesConfig, ctx: StageContext) -> dict[str, TaskBaseline]:
    if config.num_task_prompts == 0:
        return {}
    results: dict[str, TaskBaseline] = {}
    generate = prefix_generate(lm.model)
    with ctx.report.track("tasks", len(TASKS), unit="tasks") as bar:
        for task in TASKS:
            prompts = make_prompts(task, "test", config.num_task_prompts, ctx.seed)
            check_lengths(lm, prompts)
            result = run_task(
                generate, prompts, lm.tokenizer, device=lm.device, end_ids=lm.end_token_ids
            )
            working = None
            if task == "addition":
                right = [
                    working_is_right(prompt, row.completion)
                    for prompt, row in zip(prompts, result.rows, strict=True)
                ]
                working = sum(right) / len(right)
            results[task] = TaskBaseline(result, working)
            bar.advance(1, task)
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
    tokens: Mapping[str, Tensor],
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
        tokens={split: ids.numel() for split, ids in tokens.items()},
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

"""The report's figures of results beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rldecoder.dashboard import figures
from rldecoder.dashboard.figures import Dot
from rldecoder.dashboard.report import FigureEntry
from rldecoder.interp.kinds import Coverages
from rldecoder.rl.controls import BESIDE, FROZEN, SUPERVISED, TRAINED, TRAINED_END

COVERED = {
    "label": "most important latents",
    "shuffled": "the same, labels shuffled",
    "drawn": "latents drawn at random",
    "random_sae": "random SAE, drawn alike",
}
ARMS = {
    FROZEN: "frozen model",
    TRAINED: "PPO, as published",
    TRAINED_END: "PPO, end of its training",
    **BESIDE,
    SUPERVISED: "supervised decoder, its start",
    "text_only": "more supervised training",
    "random_reward": "random reward",
    "random_decoder": "random decoder",
    "uniform_policy": "uniform policy",
}
"""Systems of `controls.parquet` in words, in the order of the figure."""


def coverage_figure(found: Coverages | None) -> FigureEntry | None:
    """Share of latents whose label passes, beside the controls', by kind of label."""
    if found is None:
        return None
    groups: dict[str, list[Dot]] = {"either": [], "input": [], "output": []}
    for name, shown in COVERED.items():
        method = found.methods.get(name)
        if method is None:
            continue
        kinds = (method.coverage, method.input_coverage, method.output_coverage)
        for dots, share in zip(groups.values(), kinds, strict=True):
            if share.value is not None and share.low is not None and share.high is not None:
                dots.append(Dot(shown, share.value, share.low, share.high))
    return FigureEntry(
        figures.interval_plot(groups, x_label="share of latents with a label that passes"),
        "How many latents have a label?",
        "Labels that pass on unseen text, by one procedure for all rows; those that could not be "
        "made count as failed. Wilson 95 % intervals.",
    )


def arms_figure(systems: Sequence[Mapping[str, Any]], all_tasks: str) -> FigureEntry | None:
    """Task score of PPO beside its start, its controls and trainings without a reward.

    Args:
        systems: rows of `controls.parquet`.
        all_tasks: what they call the rows over all tasks.
    """
    rows = {row["system"]: row for row in systems if row["task"] == all_tasks}
    dots = [
        Dot(shown, row["score"], row["score_low"], row["score_high"])
        for name, shown in ARMS.items()
        if (row := rows.get(name)) is not None
    ]
    if not dots:
        return None
    return FigureEntry(
        figures.interval_plot({"score": dots}, x_label="task score, with 95 % interval"),
        "PPO beside its controls.",
        f"The same {next(iter(rows.values()))['num_prompts']} test prompts for every row.",
    )

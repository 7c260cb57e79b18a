"""The end of a run: what was built in three lines, the targets, three explanations, what next."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.artifacts.catalogue import (
    Controls,
    Evaluation,
    FinalDecoder,
    Report,
    TrainedExplainer,
)
from rldecoder.cli.options import same_run
from rldecoder.run import Run

Typed = tuple[Path, str | None, list[str] | None]
"""Config, `--store` and the texts of `--set`, as they were given on the command line."""

SHOWN_EXAMPLES = 3
EXAMPLE_PROMPT = "She opened the door and saw"


def print_summary(console: Console, run: Run, typed: Typed) -> None:
    """What was built, targets with measured values, caveats, explanations, commands."""
    for line in built(run):
        console.print(line)
    console.print()
    console.print(_targets(run))

    report = run.artifact(Report)
    for caveat in report.caveats:
        console.print(f"[yellow]caveat[/yellow] {escape(caveat)}")
    console.print()

    from rldecoder.explain.explanation import render_explanation  # slow: imports torch

    # Explanations that claim something are worth more of the reader's screen.
    examples = run.artifact(TrainedExplainer).examples.root
    for example in sorted(examples, key=lambda example: not example.claims)[:SHOWN_EXAMPLES]:
        console.print(render_explanation(example))

    console.print("next:")
    again = same_run(*typed)
    for command in (
        f'rldecoder explain {again} "{EXAMPLE_PROMPT}"',
        f"rldecoder serve {again}",
        f"rldecoder status {again}",
    ):
        console.print(f"  {escape(command)}", soft_wrap=True)
    console.print(f"report: {escape(str(report.page))}", soft_wrap=True)


def built(run: Run) -> list[str]:
    """Whether the decoder is frozen, how faithful and how labelled it is, what the reward gave; and
    tasks on which it is behind the frozen model, if any."""
    freeze = run.artifact(FinalDecoder).freeze
    evaluation = run.artifact(Evaluation)
    targets = evaluation.targets
    if freeze.frozen:
        asked = run.config.train_ppo
        tasks = ", ".join([*asked.tasks, *(task.name for task in asked.file_tasks)])
        status = (
            f"[green]frozen[/green]: its KL, its score on {escape(tasks)} and its controls allow it"
        )
    else:
        status = f"[yellow]not frozen[/yellow]: {escape('; '.join(freeze.reasons))}"
    kl, agreement = (
        targets["kl_rl" if freeze.which == "ppo" else "kl_supervised"],
        targets["agreement"],
    )
    labelled, precision = targets["label_coverage"], targets["claim_precision"]

    gain = next(c for c in run.artifact(Controls).record.comparisons if c.control == "supervised")
    return [
        f"[bold]The {escape(freeze.which)} decoder is {status}.[/bold]",
        f"Against the frozen model on held-out text: KL {_number(kl.value, '.2f')} nats a token, "
        f"the same first choice at {_number(agreement.value, '.0%')} of the tokens. Labels of high "
        f"confidence: {_number(labelled.value, '.0%')}; claims that hold: "
        f"{_number(precision.value, '.0%')}.",
        f"PPO added {gain.score_difference:+.2f} [{gain.score_low:+.2f}, {gain.score_high:+.2f}] "
        "of task score to the supervised decoder it started from; on the same prompts the "
        f"published decoder scores {freeze.drop_in_words()}.",
        *tasks_behind(run, freeze.which),
    ]


def tasks_behind(run: Run, which: str) -> list[str]:
    """Tasks of `evaluate` that the published decoder answers worse than freezing would allow.

    The decision to freeze looks at the tasks that PPO asked, and a mean over tasks hides one that
    lost what another gained.
    """
    from rldecoder.evals.comparison import RL, SUPERVISED  # slow: imports torch

    model = RL if which == "ppo" else SUPERVISED
    bound = run.config.freeze_decoder.max_task_drop
    worse = [
        f"{row['task']} by {row['drop']:.2f} [{row['drop_low']:.2f}, {row['drop_high']:.2f}]"
        for row in run.artifact(Evaluation).tasks.to_pylist()
        if row["model"] == model and row["drop"] >= bound
    ]
    if not worse:
        return []
    listed = escape(", ".join(worse))
    return [f"[yellow]Behind the frozen model[/yellow] on tasks of `evaluate`: {listed}."]


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _targets(run: Run) -> Table:
    table = Table(title="Targets of the original plan", title_justify="left")
    table.add_column("target")
    table.add_column("goal", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("met")
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]", None: "[yellow]unknown[/yellow]"}
    for row in run.artifact(Evaluation).targets.root:
        value = "-" if row.value is None else f"{row.value:.4g}"
        table.add_row(escape(row.name), escape(row.target), value, marks[row.met])
    return table

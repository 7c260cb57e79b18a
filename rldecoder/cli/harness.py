"""`rldecoder lm-eval`: the run's models on tasks of EleutherAI's harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from rldecoder.artifacts.catalogue import Evaluation
from rldecoder.cli.options import ConfigPath, SetOption, StoreOption, open_named
from rldecoder.config.explain import require_harness
from rldecoder.errors import BadInputError
from rldecoder.terminal import Terminal

if TYPE_CHECKING:
    from rldecoder.evals.harness_scores import Score
    from rldecoder.evals.harness_systems import System
    from rldecoder.evals.prompts import TaskPrompt
    from rldecoder.lm.frozen import FrozenLM
    from rldecoder.run import Run

FROZEN, SPLICED, SUPERVISED, RL = SYSTEMS = ("frozen", "spliced", "supervised", "rl")
RESULTS = Evaluation.harness.name


def lm_eval(
    config: ConfigPath,
    tasks: Annotated[
        str, typer.Option(help="Names: the run's own, those of --include, or published ones (hub).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for tasks and results.")] = Path("lm-eval"),
    store: StoreOption = None,
    overrides: SetOption = None,
    systems: Annotated[str, typer.Option(help="Of these four, in order.")] = ",".join(SYSTEMS),
    include: Annotated[
        list[Path] | None, typer.Option(help="A folder with YAMLs of tasks (repeatable).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents at once.")] = 16,
) -> None:
    """Ask frozen model, spliced model and decoders the tasks of lm-evaluation-harness.

    Example: rldecoder lm-eval quickstart --tasks addition,cloze.
    """
    require_harness()
    run = open_named(config, store, overrides)
    wanted = _names(systems, "--systems")
    if wanted[:1] != [FROZEN] or not set(wanted) <= set(SYSTEMS):
        raise BadInputError(
            f"--systems {systems!r} cannot be compared.",
            "Deltas are taken to the frozen model.",
            f"Begin with {FROZEN}; the others are {', '.join(SYSTEMS[1:])}.",
        )
    scores = evaluate(
        run, _names(tasks, "--tasks"), wanted, out, include or [], limit=limit,
        batch_size=batch_size,
    )  # fmt: skip
    _show(scores, out / RESULTS)


def evaluate(
    run: Run,
    tasks: Sequence[str],
    wanted: Sequence[str],
    out: Path,
    include: Sequence[Path] = (),
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> list[Score]:
    """Ask the systems, write `lm_eval.json`, and give the scores.

    Args:
        run: with its decoders published.
        wanted: systems, the frozen model first.
        out: a folder; the run's own tasks are written to `out/tasks`.
        limit: documents a task at most.

    Raises:
        BadInputError: the run has not come so far, or there is no such task.
    """
    from rldecoder.evals.harness import ask_harness

    lm, chosen = run.lm(), _systems(run, wanted)
    found = ask_harness(
        lm, chosen, tasks, _own_tasks(run, lm, tasks), out / "tasks", include,
        limit=limit, batch_size=batch_size,
        say=lambda text: Terminal(stderr=True).print(escape(text)),
    )  # fmt: skip
    scores = _beside_ours(run, found.scores, limit)
    out.mkdir(parents=True, exist_ok=True)
    found.model_copy(update={"scores": tuple(scores)}).save(out / RESULTS)
    return scores


def _names(text: str, option: str) -> list[str]:
    names = [*dict.fromkeys(name.strip() for name in text.split(",") if name.strip())]
    if not names:
        raise BadInputError(f"{option} names nothing.", "", f"Example: {option} addition,cloze")
    return names


def _systems(run: Run, wanted: Sequence[str]) -> dict[str, System]:
    from rldecoder.artifacts.catalogue import Policy, SupervisedDecoder
    from rldecoder.evals.harness_systems import decoder_system, frozen_system, spliced_system

    lm, found = run.lm(), {}
    for name in wanted:
        if name == FROZEN:
            found[name] = frozen_system(lm)
        elif name == SPLICED:
            found[name] = spliced_system(lm, run.sae(), run.config.cache_activations.hook_layer)
        elif name == SUPERVISED:
            found[name] = decoder_system(lm, run.artifact(SupervisedDecoder).load(lm, run.sae()))
        else:
            found[name] = decoder_system(lm, run.artifact(Policy).load(lm, run.sae()))
    return found


def _own_tasks(run: Run, lm: FrozenLM, tasks: Sequence[str]) -> Mapping[str, list[TaskPrompt]]:
    """The prompts that the stage `evaluate` asks, of those of its tasks that are named."""
    from rldecoder.evals.suite import TaskSuite
    from rldecoder.seeds import derive_seed

    settings = run.config.evaluate
    named = {name.removesuffix("_choices") for name in tasks}
    files = [task for task in settings.file_tasks if task.name in named and task.path.is_file()]
    suite = TaskSuite([task for task in settings.tasks if task in named], files, lm)
    seed = derive_seed(run.config.seed, "evaluate")
    return {
        name: suite.make(
            name, "test", settings.num_prompts, derive_seed(seed, "prompts", name), fewer=True
        )
        for name in suite.names
    }


def _beside_ours(run: Run, scores: Sequence[Score], limit: int | None) -> list[Score]:
    """The scores with those that the stage `evaluate` published, where it asked the same."""
    from rldecoder.evals.harness_scores import beside_ours

    if limit is not None or run.missing([Evaluation]):
        return [*scores]
    rows = run.artifact(Evaluation).tasks.to_pylist()
    ours = {(row["task"], row["model"]): row["score"] for row in rows}
    return beside_ours(scores, ours)


def _show(scores: Sequence[Score], path: Path) -> None:
    # Lines between columns would take the room that whole words need on 80 characters.
    table = Table(
        title="lm-evaluation-harness", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True, caption="±: standard error", caption_justify="left",
    )  # fmt: skip
    for column in ("task", "metric", "system"):
        table.add_column(column, overflow="fold")
    for column in ("n", "value", "to frozen", "ours"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in scores:
        table.add_row(
            escape(one.task), escape(one.counted), one.system, str(one.n),
            f"{one.value:.3f}{_number(one.stderr, ' ± ')}",
            "" if one.delta is None else f"{one.delta:+.3f}{_number(one.delta_stderr, ' ± ')}",
            _number(one.ours),
        )  # fmt: skip
    terminal = Terminal()
    terminal.print(table)
    terminal.print(f"results: {escape(str(path))}")


def _number(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.3f}"

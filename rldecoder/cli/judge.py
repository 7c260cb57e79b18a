"""The commands around people's judgments: blind pairs out, filled-in files in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder import schemas
from rldecoder.artifacts.catalogue import ActivationCache, TrainedExplainer
from rldecoder.errors import BadInputError, require_empty

if TYPE_CHECKING:
    from rldecoder.run import Run

BLIND_FILE = "judge.jsonl"
KEY_FILE = "key.json"


def export_pairs(run: Run, out: Path, console: Console, *, count: int, seed: int) -> None:
    """Explain held-out prompts and write them as blind pairs, with the key in another file.

    Half of the prompts are of the generated tasks (as far as there are so many), the rest are
    beginnings of test text.

    Raises:
        BadInputError: the run has no explainer yet, or `out` holds something already.
    """
    require_empty(out, "A new key would not fit files that judges already have.")
    from rldecoder.opened import EXPLAINING

    # Refused before seconds of imports.
    run.require((*EXPLAINING, ActivationCache), "to explain")
    from rldecoder.explain.held_out_texts import MAX_TASK_TEXTS, task_texts, text_beginnings
    from rldecoder.explain.judging import blind_pairs, write_blind

    prompts = task_texts(min(count // 4, MAX_TASK_TEXTS), seed)
    prompts += text_beginnings(
        run.lm(),
        run.artifact(ActivationCache).reader("test"),
        count - len(prompts),
        run.config.train_explainer.example_tokens,
    )
    items, key = blind_pairs(
        [run.reader().explain(prompt) for prompt in prompts],
        seed=seed,
        artifact=run.artifact(TrainedExplainer).digest,
    )

    out.mkdir(parents=True, exist_ok=True)
    write_blind(items, out / BLIND_FILE)
    schemas.write_json(out / KEY_FILE, key.model_dump(mode="json"))
    for name, what in ((BLIND_FILE, "give each judge a copy"), (KEY_FILE, "keep it back")):
        console.print(f"{escape(str(out / name))}: {what}", soft_wrap=True)
    console.print(f"{len(items)} pairs")


def score_files(key_path: Path, files: Sequence[Path], result: Path, console: Console) -> None:
    """Count what judges filled in, print it, and write it as JSON.

    Raises:
        BadInputError: a file cannot be counted, two are of the same name, or the result cannot be
            written.
    """
    from rldecoder.explain.judging import read_answers, read_key, score_judgments

    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        raise BadInputError(
            "Two files have the same name.",
            "A file's name is its judge's.",
            "Rename one, such as ann.jsonl and ben.jsonl.",
        )

    key = read_key(key_path)
    score = score_judgments(
        {name: read_answers(path, key) for name, path in zip(names, files, strict=True)}, key
    )
    try:
        schemas.write_json(result, {"explainer": key.artifact, "judges": names, **score})
    except OSError as error:
        raise BadInputError(
            f"{result} cannot be written.", str(error), "Give another path to --result."
        ) from error

    # A number that cannot be computed is a dash, never 0.
    rate, sign = score["win_rate"], score["sign_test"]
    table = Table(title="Method B against Method A, by people", title_justify="left")
    for column in ("measure", "value", ""):
        table.add_column(column)
    table.add_row("judges", str(score["num_judges"]), f"{score['num_items']} pairs each")
    table.add_row("win rate", f"{rate['mean']:.3f}", f"{rate['low']:.3f} to {rate['high']:.3f}")
    table.add_row(
        "sign test, p",
        "–" if sign["pvalue"] is None else f"{sign['pvalue']:.4f}",
        f"{sign['wins']} won, {sign['losses']} lost, {sign['even']} even",
    )
    alpha = score["alpha"]
    table.add_row(
        "Krippendorff's alpha",
        "–" if alpha is None else f"{alpha:.3f}",
        escape(score["alpha_note"]),
    )
    first = score["first_chosen"]
    table.add_row("first one chosen", "–" if first is None else f"{first:.3f}", "")
    console.print(table)
    console.print(f"written: {escape(str(result))}", soft_wrap=True)

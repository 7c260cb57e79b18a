"""How faithful a run's decoder is on text that no part of its corpus is like.

    python -m benchmarks.foreign_text configs/quickstart.yaml --texts ../shared/data/text

Each Parquet file of `--texts` (columns `id`, `text`) is a kind of text; of novels, passages that
are mostly direct speech are a kind of their own. From each kind passages of 256 tokens are drawn
with a seed, one a document, and both models read them. KL(frozen || decoder) is a mean over
passages with a 95 % bootstrap interval over them; the first token, an attention sink, is left out.
About ten minutes of one CPU core for the quickstart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from rldecoder.evals.statistics import bootstrap_mean_ci
from rldecoder.explain.reading import Reading
from rldecoder.run import open_run

TOKENS = 256
CHARACTERS = 12 * TOKENS
"""More than a passage needs; the tokenizer cuts the rest off."""
SPEECH = re.compile(r"[\"“‘'][A-Z][^\"”]{8,}[\"”’']")
MUCH_SPEECH = 6
"""Turns of direct speech in a passage that counts as a dialogue."""


class Passage(NamedTuple):
    """What both models make of a passage."""

    kl: float
    """Mean KL(frozen || decoder), nats a token."""
    agreement: float
    """Share of tokens with the same first choice."""
    surprise: float
    """Cross-entropy of the frozen model, nats a token: how strange the text is to it."""


def passages(file: Path, rng: random.Random) -> Iterator[str]:
    """Starts of paragraphs, one a document, in random order."""
    texts: list[str] = pq.read_table(file, columns=["text"]).column("text").to_pylist()
    rng.shuffle(texts)
    for text in texts:
        starts = [0, *(found.end() for found in re.finditer(r"\n\n+", text))]
        starts = [start for start in starts if len(text) - start >= CHARACTERS]
        if starts:
            start = rng.choice(starts)
            yield text[start : start + CHARACTERS]


def kinds(folder: Path, rng: random.Random) -> dict[str, Iterator[str]]:
    """Every file's passages, and the dialogues among the novels'."""
    found = {file.stem: passages(file, rng) for file in sorted(folder.glob("*.parquet"))}
    for file in folder.glob("novels*.parquet"):
        found["dialogue in novels"] = (
            text for text in passages(file, rng) if len(SPEECH.findall(text)) >= MUCH_SPEECH
        )
    return found


def measured(reading: Reading) -> Passage:
    """Over all positions but the first; the last has no token after it."""
    seen = reading.predictions[1:-1]
    actual = [trace.actual[0] for trace in seen if trace.actual is not None]
    return Passage(
        float(np.mean([trace.kl for trace in seen])),
        float(np.mean([trace.agree for trace in seen])),
        float(np.mean(-np.log(np.maximum(actual, 1e-30)))),
    )


def main(
    config: Annotated[Path, typer.Argument(help="A finished run's YAML.")],
    texts: Annotated[Path, typer.Option(help="Folder of Parquet files with a column `text`.")],
    store: Annotated[str | None, typer.Option(help="Artifact store.")] = None,
    count: Annotated[int, typer.Option(help="Passages of each kind.")] = 24,
    seed: int = 0,
) -> None:
    """Print a row for each kind of text."""
    run = open_run(str(config), store)
    reader, tokenizer = run.reader(), run.lm().tokenizer
    table = Table("text", "passages", "KL, nats a token", "agreement", "frozen model's CE")
    for name, source in kinds(texts, random.Random(seed)).items():
        rows = []
        for _, text in zip(range(count), source, strict=False):
            ids = tokenizer(text)["input_ids"][:TOKENS]
            with torch.no_grad():
                rows.append(measured(Reading(reader, ids)))
        kl, agreement, surprise = (
            bootstrap_mean_ci(np.array(column), seed=seed) for column in zip(*rows, strict=True)
        )
        table.add_row(
            name,
            f"{len(rows)}",
            f"{kl.mean:.3f} [{kl.low:.3f}, {kl.high:.3f}]",
            f"{agreement.mean:.3f} [{agreement.low:.3f}, {agreement.high:.3f}]",
            f"{surprise.mean:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

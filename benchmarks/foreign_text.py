"""How faithful a run's decoder is on text that no part of its corpus is like.

    python -m benchmarks.foreign_text configs/quickstart.yaml --texts ../shared/data/text
    python -m benchmarks.foreign_text configs/quickstart.yaml --tokens 160 \
        --texts ../shared/data/mini/ood_260k.parquet

Each Parquet file (columns `id`, `text`) is a kind of text, or each value of its column `domain`; of
novels, passages that are mostly direct speech are a kind of their own. From each kind passages are
drawn with a seed, one a document, and both models read them. KL(frozen || decoder) is a mean over
passages with a 95 % bootstrap interval over them; the first token, an attention sink, is left out.
About ten minutes of one CPU core for the quickstart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import islice
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

CHARACTERS = 12
"""A token, at most on average; the tokenizer cuts the rest off."""
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


def read_texts(file: Path) -> dict[str, list[str]]:
    """Documents of each kind in a file."""
    table = pq.read_table(file)
    if "domain" not in table.column_names:
        return {file.stem: table.column("text").to_pylist()}
    found: dict[str, list[str]] = {}
    for row in table.select(["domain", "text"]).to_pylist():
        found.setdefault(row["domain"], []).append(row["text"])
    return found


def passages(texts: list[str], tokens: int, rng: random.Random) -> Iterator[str]:
    """A stretch of each document from the start of a paragraph, in random order.

    Not nearer to its end than a passage is long, where the document has so much.
    """
    for text in rng.sample(texts, len(texts)):
        starts = [0, *(found.end() for found in re.finditer(r"\n\n+", text))]
        starts = [start for start in starts if len(text) - start >= CHARACTERS * tokens] or [0]
        start = rng.choice(starts)
        yield text[start : start + CHARACTERS * tokens]


def kinds(path: Path, tokens: int, rng: random.Random) -> dict[str, Iterator[str]]:
    """Every kind's passages, and the dialogues of files of novels."""
    found: dict[str, Iterator[str]] = {}
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        for kind, texts in read_texts(file).items():
            found[kind] = passages(texts, tokens, rng)
            if "novels" in kind or "novels" in file.stem:
                found["dialogue in novels"] = (
                    text
                    for text in passages(texts, tokens, rng)
                    if len(SPEECH.findall(text)) >= MUCH_SPEECH
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
    texts: Annotated[Path, typer.Option(help="Parquet file, or a folder of them.")],
    store: Annotated[str | None, typer.Option(help="Artifact store.")] = None,
    count: Annotated[int, typer.Option(help="Passages of each kind.")] = 24,
    tokens: Annotated[
        int, typer.Option(help="Length of a passage; shorter ones are left out.")
    ] = 256,
    seed: int = 0,
) -> None:
    """Print a row for each kind of text."""
    run = open_run(str(config), store)
    reader, tokenizer = run.reader(), run.lm().tokenizer
    table = Table("text", "passages", "KL, nats a token", "agreement", "frozen model's CE")
    for name, source in kinds(texts, tokens, random.Random(seed)).items():
        encoded = (tokenizer(text)["input_ids"][:tokens] for text in source)
        whole = (ids for ids in encoded if len(ids) == tokens)
        with torch.no_grad():
            rows = [measured(Reading(reader, ids)) for ids in islice(whole, count)]
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

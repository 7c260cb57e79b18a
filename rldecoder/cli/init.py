"""The command `init`: a complete config for one's own text, fitted to the text and the machine."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape

from rldecoder.config import own_text
from rldecoder.config.base import name_on_hub
from rldecoder.config.data import IngestConfig, LocalSource, PysourceSource, ReaderSource, Source
from rldecoder.config.model import SyncTokenizerConfig
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.data.counting import Encode, TextCount, count_text
from rldecoder.data.folders import list_files
from rldecoder.errors import BadInputError
from rldecoder.files import write_bytes
from rldecoder.seeds import derive_seed

if TYPE_CHECKING:
    from rldecoder.lm.smoke import SmokeResult

FEW_DOCUMENTS = 40
"""Fewer documents than this cannot fill four splits evenly."""
BUSY = 0.7
"""Share of one core's time below which the machine was busy with something else."""
_PARTS = 120
_PART_CHARS = (1500, 8000)
_MOST_TOKENS = 3_000_000
_CODE = (".py", ".js", ".c", ".cpp", ".rs", ".go", ".java")


class Asked(NamedTuple):
    """What the command line says."""

    out: Path
    model: str
    text: Sequence[Path]
    column: str
    separator: str | None
    ood: Sequence[Path]
    layer: int | None
    minutes: float
    overwrite: bool


def write_config(asked: Asked, console: Console) -> None:
    """Count the text, try the model, and write the config.

    Raises:
        BadInputError: the file is there already, there is no such text or model, or the text is
            too short for a run.
    """
    if asked.out.exists() and not asked.overwrite:
        raise BadInputError(
            f"{asked.out} is there already.", "", "Name another file, or add --overwrite."
        )
    settings = _model_settings(asked.model)
    _say(console, "looking at the text ...")
    list_files(tuple(map(str, asked.text)))  # a missing file is told before the model is loaded

    # Slow to import from here on.
    import torch

    from rldecoder.lm.model_sources import fetch, locate
    from rldecoder.lm.registry import choose_model
    from rldecoder.lm.smoke import smoke_test
    from rldecoder.lm.text_tokens import encode_documents, load_tokenizer
    from rldecoder.planning.throughput import keep
    from rldecoder.provenance import device_name

    choice = choose_model(
        settings.model, path=settings.path, repo=settings.repo, revision=settings.revision
    )
    folder = fetch(locate(choice.sources), lambda line: _say(console, line))
    tokenizer = load_tokenizer(folder)
    source, count = _counted(asked, lambda texts: encode_documents(tokenizer, texts))
    _require_enough(count)

    _say(console, f"running {asked.model} on 1,024 tokens to see how fast it is here ...")
    began, used = time.perf_counter(), time.process_time()
    smoke = replace(smoke_test(str(folder)), model=asked.model)
    share = (time.process_time() - used) / (time.perf_counter() - began)
    if share < BUSY:
        # Others' work is not the machine's speed; what it is worth alone is at least this.
        smoke = replace(smoke, tokens_per_second=smoke.tokens_per_second / share)
        _say(console, f"  other work is in the way (this had {share:.0%} of one core); allowed for")
    else:
        keep(smoke, device_name(torch.device("cpu")), torch.get_num_threads())
    text = _described(asked, settings, source, count, smoke)
    budgets, seconds = _fitted(text, smoke, asked)
    said = f"about {_minutes(sum(seconds.values()))} on {_machine()}, nothing beside it"
    content = own_text.own_text_yaml(text.model_copy(update={"time_said": said}), budgets)
    write_bytes(asked.out, content.encode())
    load_run_config(asked.out)  # what is written can be run
    _tell(asked, text, budgets, seconds, smoke, console)


def _model_settings(model: str) -> SyncTokenizerConfig:
    if Path(model).is_dir():
        return SyncTokenizerConfig(model="folder", path=model)
    return SyncTokenizerConfig.model_validate(name_on_hub({"model": model}))


def _source(asked: Asked, document_chars: int | None) -> LocalSource:
    return LocalSource(
        paths=tuple(map(str, asked.text)),
        text_column=asked.column,
        document_separator=asked.separator,
        document_chars=document_chars,
    )


def _counted(asked: Asked, encode: Encode) -> tuple[LocalSource, TextCount]:
    """The text, and what is in it; few long files are cut into parts, so that all splits fill."""
    config = IngestConfig(max_document_chars=None)
    seed = derive_seed(0, "ingest")

    def count(source: Source) -> TextCount:
        return count_text([source], config, seed, encode, most_tokens=_MOST_TOKENS)

    whole = _source(asked, None)
    found = count(whole)
    few = found.documents < FEW_DOCUMENTS or found.longest > found.characters / 10
    if not few or not found.complete:
        return whole, found
    low, high = _PART_CHARS
    parts = _source(asked, min(max(found.characters // _PARTS, low), high))
    return parts, count(parts)


def _require_enough(count: TextCount) -> None:
    short = [
        f"{name} {count.tokens[name]:,} (of {least * own_text.LENGTH:,})"
        for name, least in own_text.LEAST_SEQUENCES.items()
        if count.tokens[name] < least * own_text.LENGTH
    ]
    if not short:
        return
    dropped = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in count.dropped.items())
    raise BadInputError(
        f"The text is too short for a run: {count.total:,} tokens, {count.documents:,} documents.",
        f"Too few tokens for {', '.join(short)}." + (f" Left out: {dropped}." if dropped else ""),
        "Give more text: from about 20,000 tokens (80 kB) a run can be made, 120,000 (500 kB) are "
        "better. For rows of a table name the column with --column.",
    )


def _described(
    asked: Asked,
    settings: SyncTokenizerConfig,
    source: LocalSource,
    count: TextCount,
    smoke: SmokeResult,
) -> own_text.OwnText:
    num_layers = len(smoke.hidden_shapes) - 1
    layer = own_text.few_blocks(num_layers) if asked.layer is None else asked.layer
    if not 1 <= layer < num_layers:
        raise BadInputError(
            f"--layer {layer} is not possible.",
            f"The model has {num_layers} blocks, of which at least one must remain above.",
            f"Take 1 to {num_layers - 1}, or leave it out.",
        )

    # What was counted stands in the config as comments, so that its budgets can be understood.
    least = "" if count.complete else "at least "
    lines = [
        f"{least}{count.characters:,} characters, {count.total:,} tokens, "
        f"{count.documents:,} documents"
    ]
    for why, number in count.dropped.items():
        lines.append(f"left out: {number:,} documents ({why.replace('_', ' ')})")
    if source.document_chars is not None:
        lines.append("Few long files: cut at paragraphs into documents, so that every split fills;")
        lines.append("held-out text is then of the same files, which a caveat says.")

    ood, ood_said = _out_of_domain(asked)
    return own_text.OwnText(
        name=_run_name(asked.out),
        command="rldecoder init " + shlex.join(sys.argv[2:] or [str(asked.out)]),
        model=settings.repo or settings.model,
        model_path=settings.path,
        num_layers=num_layers,
        hook_layer=layer,
        sources=(_plain(source),),
        ood_sources=(_plain(ood),),
        ood_said=ood_said,
        text_said=tuple(lines),
        tokens=count.tokens,
    )


def _out_of_domain(asked: Asked) -> tuple[Source, str]:
    if asked.ood:
        named = LocalSource(paths=tuple(map(str, asked.ood)), text_column=asked.column)
        return named, f"the files of {', '.join(map(str, asked.ood))}"
    if any(path.suffix in _CODE for path in asked.text):
        return ReaderSource(), "English prose that comes with the project"
    return PysourceSource(), "Python source code of the standard library"


def _plain(source: Source) -> dict[str, object]:
    """A source as YAML takes it: its kind, and what is not the default."""
    values = source.model_dump(mode="json", exclude_defaults=True)
    return {"type": source.type, **{key: v for key, v in values.items() if key != "type"}}


def _fitted(
    text: own_text.OwnText, smoke: SmokeResult, asked: Asked
) -> tuple[own_text.Budgets, dict[str, float]]:
    """The most training text that there is time for, and the seconds of each stage."""
    from rldecoder.planning.durations import expected_seconds, rate_of

    rate = rate_of(smoke)

    def tried(most_train: int) -> tuple[own_text.Budgets, dict[str, float]]:
        budgets = own_text.fit_budgets(text.tokens, most_train)
        run = _as_run(text, budgets)
        return budgets, expected_seconds(run, smoke.constants, rate)

    most = max(text.tokens["train"], own_text.LEAST_TRAIN)
    fitted = tried(most)
    while sum(fitted[1].values()) > 60 * asked.minutes and most > own_text.LEAST_TRAIN:
        most = max(own_text.LEAST_TRAIN, int(most * 0.9))
        fitted = tried(most)
    return fitted


def _as_run(text: own_text.OwnText, budgets: own_text.Budgets) -> RunConfig:
    import yaml

    return RunConfig.model_validate(yaml.safe_load(own_text.own_text_yaml(text, budgets)))


def _run_name(out: Path) -> str:
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in out.stem.lower())
    return kept.strip("-") or "mine"


def _machine() -> str:
    import torch

    from rldecoder.provenance import device_name

    return f"this machine ({device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads)"


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60)):,} minutes"


def _tell(
    asked: Asked,
    text: own_text.OwnText,
    budgets: own_text.Budgets,
    seconds: dict[str, float],
    smoke: SmokeResult,
    console: Console,
) -> None:
    """Say what was written, from what, and how long it takes."""
    total = sum(seconds.values())
    longest = sorted(seconds, key=lambda name: -seconds[name])[:3]
    splits = ", ".join(f"{name} {budgets.splits[name]:,}" for name in own_text.SPLITS)

    _say(console, f"wrote {asked.out}")
    for line in text.text_said:
        _say(console, f"  text: {line}")
    _say(console, f"  tokens used: {splits}; out of domain: {text.ood_said}")
    _say(
        console,
        f"  model: hook layer {text.hook_layer} of {text.num_layers}, "
        f"{smoke.tokens_per_second:,.0f} tokens/s here",
    )
    _say(
        console,
        f"  time: about {_minutes(total)} with nothing beside it (most: "
        + ", ".join(f"{name} {_minutes(seconds[name])}" for name in longest)
        + ")",
    )

    # The budgets cannot always keep to --minutes, or keep to it by leaving text out: both are told.
    if total > 60 * asked.minutes:
        _say(
            console,
            f"  That is more than {asked.minutes:g} minutes: the model is slow here, and less "
            f"text would teach nothing. A layer nearer to the end (--layer), a smaller model or a "
            "faster machine helps.",
        )
    unused = text.tokens["train"] - budgets.splits["train"]
    if unused >= own_text.LENGTH:
        _say(
            console,
            f"  {unused:,} training tokens are left out to keep to {asked.minutes:g} minutes: "
            "--minutes takes more of them.",
        )

    _say(console, f"next: rldecoder run {asked.out}")


def _say(console: Console, line: str) -> None:
    console.print(escape(line), soft_wrap=True)

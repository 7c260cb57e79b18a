"""Text to sequences of tokens: read, clean, split by document, drop duplicates, pack, shard."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rldecoder.artifacts.catalogue import Corpus
from rldecoder.config.data import IngestConfig
from rldecoder.data.deduplicate import CrossSplitDeduplicator
from rldecoder.data.documents import Candidate, Document, assign_split, clean_text, split_text
from rldecoder.data.folders import told
from rldecoder.data.packing import SequencePacker, TokenShardWriter
from rldecoder.data.provenance import Provenance, SourceProvenance, SplitProvenance
from rldecoder.data.shards import SPLITS, DocumentRow
from rldecoder.data.sources import candidates, fingerprint, left_out_files
from rldecoder.errors import BadInputError
from rldecoder.lm.specs import stated_context_length
from rldecoder.lm.text_tokens import encode_documents, tokens_in_front
from rldecoder.reporting import Bar
from rldecoder.schemas import read_json
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import IngestInputs

TOKENIZER_BATCH_DOCUMENTS = 32
"""Documents per call of the tokenizer. A constant: it decides how many documents are admitted
after a budget is reached, and so which later ones count as duplicates."""


class Admitted(NamedTuple):
    """A clean document with its split, no duplicate of another split."""

    split: str
    document: Document


@dataclass
class Tally:
    """What happened to documents; becomes the corpus's `Provenance`."""

    dropped: Counter[str] = field(default_factory=Counter)
    rows: list[DocumentRow] = field(default_factory=list)
    """Documents of which tokens were kept."""
    cut: Counter[str] = field(default_factory=Counter)
    """Characters of each split's documents that `max_document_chars` has left unread so far."""
    continued: int = 0
    """Documents that were read on because a budget was not filled by their beginnings."""
    duplicates: set[str] = field(default_factory=set)
    """Keys of documents of which nothing more is read."""


class SplitSink(NamedTuple):
    """Where a split's documents go."""

    packer: SequencePacker
    writer: TokenShardWriter


def run(inputs: IngestInputs, config: IngestConfig, ctx: StageContext) -> Output:
    """Publish token shards per split, and where their documents came from."""
    _check_budgets(config)
    _check_context_length(config.context_length, inputs.model.model)
    tokenizer = load_tokenizer(inputs.model.model)
    sinks = _open_sinks(config, tokenizer, ctx.out)
    deduplicator = CrossSplitDeduplicator(config.near_duplicate_jaccard)
    tally = Tally()
    started = time.perf_counter()

    def in_domain(key: str) -> str:
        return assign_split(key, ctx.seed, config.fractions.model_dump())

    # In-domain text first: should a document be in both, it is out-of-domain text that goes.
    parts = [(config.sources, in_domain), (config.ood_sources, lambda key: "ood")]
    total = sum(getattr(config.budget_tokens, name) for name in sinks)
    with ctx.report.track("ingest", total, unit="tokens") as bar:
        for sources, choose_split in parts:
            for first in (True, False):
                if not first and not _has_more(sinks, tally):
                    continue
                stream = candidates(
                    sources,
                    seed=ctx.seed,
                    shuffle_buffer=config.shuffle_buffer_documents,
                    # What is no text is counted once, not at each reading.
                    dropped=tally.dropped if first else None,
                )
                choose = _admit if first else _admit_rest
                admitted = choose(stream, choose_split, sinks, deduplicator, tally, config)
                _pack(admitted, sinks, tokenizer, tally, bar)
    seconds = time.perf_counter() - started
    for sink in sinks.values():
        sink.writer.close()
    left_out = left_out_files([*config.sources, *config.ood_sources])
    _check_filled(sinks, tally, left_out, config)
    _note_losses(tally, left_out, config, ctx)
    return _publish(sinks, tally, left_out, config, ctx, seconds)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder.

    Raises:
        BadInputError: if there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"No tokenizer can be loaded from {folder}.",
            f"{error}.",
            "Rerun `sync_tokenizer` with a model that carries its tokenizer files.",
        ) from error
    if tokenizer.eos_token_id is None:
        raise BadInputError(
            f"The tokenizer in {folder} has no end-of-text token.",
            "Documents are separated by it.",
            "Set `eos_token` in tokenizer_config.json.",
        )
    return tokenizer


def _check_budgets(config: IngestConfig) -> None:
    for name in SPLITS:
        budget = getattr(config.budget_tokens, name)
        if 0 < budget < config.context_length:
            raise BadInputError(
                f"The budget of split `{name}` is {budget} tokens.",
                f"That is less than one sequence of {config.context_length}.",
                f"Raise `ingest.budget_tokens.{name}` or lower `ingest.context_length`.",
            )
    if config.budget_tokens.ood and not config.ood_sources:
        raise BadInputError(
            f"`ingest.budget_tokens.ood` is {config.budget_tokens.ood}, but no source fills it.",
            "`ingest.ood_sources` is empty.",
            "Name an out-of-domain source, or set the budget to 0.",
        )


def _check_context_length(context_length: int, model_folder: Path) -> None:
    constants = read_json(model_folder / "config.json")
    limit = stated_context_length(SimpleNamespace(**constants))
    if limit is not None and context_length > limit:
        raise BadInputError(
            f"`ingest.context_length` is {context_length}.",
            f"The model has positions for {limit} tokens.",
            f"Set it to {limit} or less.",
        )


def _open_sinks(
    config: IngestConfig, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, SplitSink]:
    front = tokens_in_front(tokenizer)
    sinks = {}
    for name in SPLITS:
        num_sequences = getattr(config.budget_tokens, name) // config.context_length
        if num_sequences:
            eos = int(tokenizer.eos_token_id)
            sinks[name] = SplitSink(
                SequencePacker(config.context_length, num_sequences, eos, front),
                TokenShardWriter(folder, name, len(tokenizer), config.shard_sequences),
            )
    return sinks


def _admit(
    stream: Iterator[Candidate],
    choose_split: Callable[[str], str],
    sinks: Mapping[str, SplitSink],
    deduplicator: CrossSplitDeduplicator,
    tally: Tally,
    config: IngestConfig,
) -> Iterator[Admitted]:
    """Documents worth packing, their beginnings where they are long. The split is known before a
    document is read, so text that no budget has room for is never parsed."""
    for candidate in stream:
        split = choose_split(candidate.key)
        if split not in sinks or sinks[split].packer.full:
            continue
        document = candidate.load()
        if document is None:
            tally.dropped["no_text"] += 1
            continue
        text, *rest = _pieces(candidate, document, config)
        if len(text) < config.min_document_chars:
            tally.dropped["too_short"] += 1
            continue
        duplicate = deduplicator.admit(split, text)
        if duplicate is not None:
            tally.dropped[f"{duplicate}_duplicates_across_splits"] += 1
            tally.duplicates.add(candidate.key)
            continue
        tally.cut[split] += sum(map(len, rest))
        yield Admitted(split, document._replace(text=text))


def _admit_rest(
    stream: Iterator[Candidate],
    choose_split: Callable[[str], str],
    sinks: Mapping[str, SplitSink],
    deduplicator: CrossSplitDeduplicator,
    tally: Tally,
    config: IngestConfig,
) -> Iterator[Admitted]:
    """What `max_document_chars` cut off the user's documents, for budgets that are not filled.

    The documentation of packages is not read on: it is there to fill small budgets, and what it
    gives stays as it was."""
    for candidate in stream:
        split = choose_split(candidate.key)
        if not candidate.users or candidate.key in tally.duplicates:
            continue
        if split not in sinks or sinks[split].packer.full:
            continue
        document = candidate.load()
        pieces = _pieces(candidate, document, config) if document is not None else []
        if document is None or len(pieces) < 2 or len(pieces[0]) < config.min_document_chars:
            continue
        tally.continued += 1
        for number, text in enumerate(pieces[1:], start=2):
            if sinks[split].packer.full:
                break
            tally.cut[split] -= len(text)
            duplicate = deduplicator.admit(split, text)
            if duplicate is None:
                title = f"{document.title} (part {number})"
                yield Admitted(split, document._replace(title=title, text=text))
            else:
                tally.dropped[f"{duplicate}_duplicates_across_splits"] += 1


def _pieces(candidate: Candidate, document: Document, config: IngestConfig) -> list[str]:
    """A document in pieces of `max_document_chars`. A user's never begins with less than is kept,
    as one whose title is followed by a long line would."""
    least = config.min_document_chars if candidate.users else 0
    return split_text(clean_text(document.text), config.max_document_chars, least)


def _has_more(sinks: Mapping[str, SplitSink], tally: Tally) -> bool:
    return any(tally.cut[name] > 0 and not sink.packer.full for name, sink in sinks.items())


def _pack(
    admitted: Iterator[Admitted],
    sinks: Mapping[str, SplitSink],
    tokenizer: PreTrainedTokenizerBase,
    tally: Tally,
    bar: Bar,
) -> None:
    """Tokenise in batches and pack until the source is exhausted or every budget is reached."""
    while batch := list(islice(admitted, TOKENIZER_BATCH_DOCUMENTS)):
        encoded = encode_documents(tokenizer, [item.document.text for item in batch])
        for item, token_ids in zip(batch, encoded, strict=True):
            packer, writer = sinks[item.split]
            doc_id = len(tally.rows)
            num_tokens = packer.add(doc_id, item.document.source, token_ids)
            if num_tokens == 0:
                continue
            writer.add(packer.take())
            document = item.document
            row = DocumentRow(
                doc_id=doc_id,
                split=item.split,
                source=document.source,
                licence=document.licence,
                title=document.title,
                num_tokens=num_tokens,
                sha256=hashlib.sha256(document.text.encode()).hexdigest(),
            )
            tally.rows.append(row)
            bar.advance(num_tokens + 1, document.title)


def _check_filled(
    sinks: Mapping[str, SplitSink], tally: Tally, left_out: Counter[str], config: IngestConfig
) -> None:
    dropped = ", ".join(f"{count} {why}" for why, count in sorted(tally.dropped.items())) or "none"
    if left_out:
        dropped += f"; files left out: {told(left_out)}"
    if not tally.rows:
        raise BadInputError(
            "The corpus is empty: no document was kept.",
            f"Dropped: {dropped}.",
            "Check `ingest.sources`, or lower `ingest.min_document_chars`.",
        )
    for name, sink in sinks.items():
        if sink.writer.num_sequences == 0:
            count = sum(row.split == name for row in tally.rows)
            raise BadInputError(
                f"Split `{name}` got no sequence of {config.context_length} tokens.",
                f"{count} of {len(tally.rows)} documents fell to it (dropped: {dropped})."
                + _cut_off(tally, name),
                "Give more or longer documents (for text files see `document_separator`), "
                f"raise `ingest.fractions.{name}`, lower `ingest.context_length`, or set its "
                "budget to 0.",
            )


def _publish(
    sinks: Mapping[str, SplitSink],
    tally: Tally,
    left_out: Counter[str],
    config: IngestConfig,
    ctx: StageContext,
    seconds: float,
) -> Output:
    splits: dict[str, SplitProvenance] = {}
    for name, sink in sinks.items():
        num_tokens = sink.writer.num_sequences * config.context_length
        budget = getattr(config.budget_tokens, name)
        splits[name] = SplitProvenance(
            documents=sum(row.split == name for row in tally.rows),
            sequences=sink.writer.num_sequences,
            tokens=num_tokens,
            budget_tokens=budget,
        )
        if budget - num_tokens >= config.context_length:
            ctx.report.note(
                f"Split {name} holds {num_tokens:,} of {budget:,} tokens: no more text."
                + _cut_off(tally, name)
            )

    by_source: dict[str, list[DocumentRow]] = {}
    for row in tally.rows:
        by_source.setdefault(row.source, []).append(row)
    sources = {
        name: SourceProvenance(
            documents=len(rows),
            tokens=sum(row.num_tokens for row in rows),
            licences=tuple(dict.fromkeys(row.licence for row in rows)),
        )
        for name, rows in by_source.items()
    }

    cut = {
        name: tally.cut[name]
        for name, sink in sinks.items()
        if not sink.packer.full and tally.cut[name] > 0
    }
    provenance = Provenance(
        context_length=config.context_length,
        splits=splits,
        sources=sources,
        dropped_documents=dict(tally.dropped),
        fingerprint=fingerprint([*config.sources, *config.ood_sources]),
        left_out_files=dict(left_out) or None,
        continued_documents=tally.continued or None,
        cut_characters=cut or None,
    )
    Corpus.documents.save_rows(ctx.out, [row._asdict() for row in tally.rows])
    Corpus.provenance.save(ctx.out, provenance)
    total = sum(split.tokens for split in splits.values())
    return Output(provenance.headline | {"tokens_per_second": total / max(seconds, 1e-9)})


def _note_losses(
    tally: Tally, left_out: Counter[str], config: IngestConfig, ctx: StageContext
) -> None:
    """Say what of the user's text is not in the tokens, and why."""
    if left_out:
        ctx.report.note(f"Left out of the folders: {told(left_out)}.")
    if tally.dropped:
        reasons = Counter({why.replace("_", " "): n for why, n in tally.dropped.items()})
        ctx.report.note(f"Dropped documents: {told(reasons)}.")
    if tally.continued:
        ctx.report.note(
            f"{tally.continued:,} documents were read on after their first "
            f"{config.max_document_chars:,} characters (ingest.max_document_chars): those had "
            "not filled every split."
        )


def _cut_off(tally: Tally, split: str) -> str:
    """What `max_document_chars` took from a split that is not full, as a sentence."""
    if tally.cut[split] <= 0:
        return ""
    return (
        f" {tally.cut[split]:,} characters of its documents were cut off by "
        "`ingest.max_document_chars`; raise it, or set it to null."
    )

"""Text to sequences of tokens: read, clean, split by document, drop duplicates, pack, shard."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rldecoder.artifacts.catalogue import Corpus, ModelFolder
from rldecoder.config.data import IngestConfig, LocalSource, TasksSource
from rldecoder.data.admission import Admission, Admitted
from rldecoder.data.documents import Candidate, assign_split
from rldecoder.data.files import kind_of
from rldecoder.data.folders import told
from rldecoder.data.packing import SequencePacker, TokenShardWriter
from rldecoder.data.provenance import Provenance, SourceProvenance, SplitProvenance
from rldecoder.data.shards import SPLITS, DocumentRow
from rldecoder.data.sources import candidates, fingerprint, left_out_files
from rldecoder.data.text_shards import ReadAhead
from rldecoder.errors import BadInputError
from rldecoder.evals.task_text import task_candidates
from rldecoder.lm.specs import stated_context_length
from rldecoder.lm.text_tokens import load_tokenizer, tokens_between, tokens_in_front
from rldecoder.reporting import Bar
from rldecoder.schemas import read_json
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import IngestInputs

BATCH_DOCUMENTS = 32
"""Documents that are admitted before they are packed. A constant: it decides how many are admitted
after a budget is reached, and so which later ones count as duplicates."""


class SplitSink(NamedTuple):
    """Where a split's documents go."""

    packer: SequencePacker
    writer: TokenShardWriter


def run(inputs: IngestInputs, config: IngestConfig, ctx: StageContext) -> Output:
    """Publish token shards per split, and where their documents came from."""
    _check_budgets(config)
    _check_context_length(config.context_length, inputs.model.model)
    record = ModelFolder.record.path(inputs.model.folder)
    tokenizer = load_tokenizer(inputs.model.model, record)
    sinks = _open_sinks(config, tokenizer, ctx.out)
    ahead = ReadAhead(ctx.shards, inputs.model.model, record, [inputs.model.folder])
    admission = Admission({name: sink.packer for name, sink in sinks.items()}, config, ahead)
    rows: list[DocumentRow] = []
    started = time.perf_counter()

    def in_domain(key: str) -> str:
        return assign_split(key, ctx.seed, config.fractions.model_dump())

    def solved_prompts(source: TasksSource) -> Iterator[Candidate]:
        return task_candidates(source.tasks, source.documents_per_task, ctx.seed)

    # In-domain text first: should a document be in both, it is out-of-domain text that goes.
    parts = [(config.sources, in_domain), (config.ood_sources, lambda key: "ood")]
    total = sum(getattr(config.budget_tokens, name) for name in sinks)
    with ctx.report.track("ingest", total, unit="tokens") as bar:
        for sources, choose_split in parts:
            # Long documents are read on only where the beginnings of all fill no budget.
            for first in (True, False):
                if not first and not admission.has_more:
                    continue
                stream = candidates(
                    sources,
                    seed=ctx.seed,
                    shuffle_buffer=config.shuffle_buffer_documents,
                    # What is no text is counted once, not at each reading.
                    dropped=admission.dropped if first else None,
                    made=solved_prompts,
                )
                admit = admission.beginnings if first else admission.rests
                _pack(admit(stream, choose_split), sinks, rows, bar)
    seconds = time.perf_counter() - started

    for sink in sinks.values():
        sink.writer.close()
    left_out = left_out_files([*config.sources, *config.ood_sources])
    _check_filled(sinks, rows, admission, left_out, config)
    _note_losses(admission, left_out, config, ctx)
    separator = None if tokens_between(tokenizer) else tuple(tokens_in_front(tokenizer))
    provenance = _provenance(sinks, rows, admission, left_out, separator, config)
    for name, split in provenance.splits.items():
        if split.budget_tokens - split.tokens >= config.context_length:
            ctx.report.note(
                f"Split {name} holds {split.tokens:,} of {split.budget_tokens:,} tokens: no more "
                f"text.{_cut_off(admission, name)}"
            )
    # Not as one dict a row, which would take as much memory as the rows again.
    columns = {name: [getattr(row, name) for row in rows] for name in DocumentRow._fields}
    Corpus.documents.save(ctx.out, columns)
    Corpus.provenance.save(ctx.out, provenance)
    total = sum(split.tokens for split in provenance.splits.values())
    return Output(
        provenance.headline | {"tokens_per_second": total / max(seconds, 1e-9)},
        reasons=(*_cut_short(admission, config), *_neighbours(rows, config)),
    )


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
    constants = constants.get("text_config") or constants  # of a model of several media
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
    front, between = tokens_in_front(tokenizer), tokens_between(tokenizer)
    sinks = {}
    for name in SPLITS:
        num_sequences = getattr(config.budget_tokens, name) // config.context_length
        if num_sequences:
            sinks[name] = SplitSink(
                SequencePacker(config.context_length, num_sequences, between, front),
                TokenShardWriter(folder, name, len(tokenizer), config.shard_sequences),
            )
    return sinks


def _pack(
    admitted: Iterator[Admitted],
    sinks: Mapping[str, SplitSink],
    rows: list[DocumentRow],
    bar: Bar,
) -> None:
    """Pack batch by batch until the source is exhausted or every budget is reached."""
    while batch := list(islice(admitted, BATCH_DOCUMENTS)):
        for item in batch:
            packer, writer = sinks[item.split]
            doc_id = len(rows)
            num_tokens = packer.add(doc_id, item.document.source, item.token_ids)
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
            rows.append(row)
            bar.advance(num_tokens + 1, document.title)


def _check_filled(
    sinks: Mapping[str, SplitSink],
    rows: Sequence[DocumentRow],
    admission: Admission,
    left_out: Counter[str],
    config: IngestConfig,
) -> None:
    counts = sorted(admission.dropped.items())
    dropped = ", ".join(f"{count} {why}" for why, count in counts) or "none"
    if left_out:
        dropped += f"; files left out: {told(left_out)}"
    if not rows:
        raise BadInputError(
            "The corpus is empty: no document was kept.",
            f"Dropped: {dropped}.",
            "Check `ingest.sources`, or lower `ingest.min_document_chars`.",
        )
    for name, sink in sinks.items():
        if sink.writer.num_sequences == 0:
            count = sum(row.split == name for row in rows)
            raise BadInputError(
                f"Split `{name}` got no sequence of {config.context_length} tokens.",
                f"{count} of {len(rows)} documents fell to it (dropped: {dropped})."
                + _cut_off(admission, name),
                "Give more or longer documents (for text files see `document_separator`), "
                f"raise `ingest.fractions.{name}`, lower `ingest.context_length`, or set its "
                "budget to 0.",
            )


def _provenance(
    sinks: Mapping[str, SplitSink],
    rows: Sequence[DocumentRow],
    admission: Admission,
    left_out: Counter[str],
    separator: tuple[int, ...] | None,
    config: IngestConfig,
) -> Provenance:
    splits = {
        name: SplitProvenance(
            documents=sum(row.split == name for row in rows),
            sequences=sink.writer.num_sequences,
            tokens=sink.writer.num_sequences * config.context_length,
            budget_tokens=getattr(config.budget_tokens, name),
        )
        for name, sink in sinks.items()
    }

    # Licences are named in the order in which they came, so that the file is the same every time.
    by_source: dict[str, list[DocumentRow]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    sources = {
        name: SourceProvenance(
            documents=len(own),
            tokens=sum(row.num_tokens for row in own),
            licences=tuple(dict.fromkeys(row.licence for row in own)),
        )
        for name, own in by_source.items()
    }

    # A full split has lost nothing that it had room for.
    cut = {
        name: admission.cut[name]
        for name, sink in sinks.items()
        if not sink.packer.full and admission.cut[name] > 0
    }
    return Provenance(
        context_length=config.context_length,
        splits=splits,
        sources=sources,
        dropped_documents=dict(admission.dropped),
        fingerprint=fingerprint([*config.sources, *config.ood_sources]),
        left_out_files=dict(left_out) or None,
        continued_documents=admission.continued or None,
        cut_characters=cut or None,
        separator=separator,
    )


def _note_losses(
    admission: Admission, left_out: Counter[str], config: IngestConfig, ctx: StageContext
) -> None:
    """Say what of the user's text is not in the tokens, and why."""
    if left_out:
        ctx.report.note(f"Left out of the folders: {told(left_out)}.")
    if admission.dropped:
        reasons = Counter({why.replace("_", " "): n for why, n in admission.dropped.items()})
        ctx.report.note(f"Dropped documents: {told(reasons)}.")
    if admission.continued:
        ctx.report.note(
            f"{admission.continued:,} documents were read on after their first "
            f"{config.max_document_chars:,} characters (ingest.max_document_chars): those had "
            "not filled every split."
        )


def _cut_short(admission: Admission, config: IngestConfig) -> tuple[str, ...]:
    """A caveat where documents of the user's own were begun and not read to their end."""
    unread = +admission.unread
    if not unread:
        return ()
    return (
        f"{len(unread):,} of your documents were cut: after their first "
        f"{config.max_document_chars:,} characters {sum(unread.values()):,} were not read "
        "(ingest.max_document_chars: null reads documents whole)",
    )


def _neighbours(rows: Sequence[DocumentRow], config: IngestConfig) -> tuple[str, ...]:
    """A caveat where parts of one text file stand in several splits."""
    if not any(
        isinstance(source, LocalSource) and source.document_chars for source in config.sources
    ):
        return ()
    splits: dict[str, set[str]] = {}
    for row in rows:
        if kind_of(Path(row.source)) == "text" and row.split != "ood":
            splits.setdefault(row.source, set()).add(row.split)
    shared = sum(len(names) > 1 for names in splits.values())
    if not shared:
        return ()
    return (
        f"held-out text comes from the same {shared} files as training text, cut into parts "
        "(document_chars): numbers on it are of familiar text",
    )


def _cut_off(admission: Admission, split: str) -> str:
    """What `max_document_chars` took from a split that is not full, as a sentence."""
    if admission.cut[split] <= 0:
        return ""
    return (
        f" {admission.cut[split]:,} characters of its documents were cut off by "
        "`ingest.max_document_chars`; raise it, or set it to null."
    )

"""Ingestion end to end: splits, leaks, budgets, provenance, bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rldecoder import sealed
from rldecoder.artifacts.catalogue import Corpus, ModelFolder
from rldecoder.config.data import IngestConfig
from rldecoder.data import text_shards
from rldecoder.data.documents import Candidate, Document
from rldecoder.data.shards import read_token_table, read_tokens
from rldecoder.data.text_shards import ReadyTexts, TextWorker
from rldecoder.errors import BadInputError
from rldecoder.executors.local import LocalExecutor
from rldecoder.lm.text_tokens import encode_prompt, load_tokenizer
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import IngestInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import published
from tests.tiny_models import BOS, with_tokens_around

STAGE = stage_named("ingest")

MakeContext = Callable[..., StageContext]
BUDGETS = {"train": 640, "validation": 64, "label": 64, "test": 128, "ood": 64}


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir: Path) -> IngestInputs:
    return IngestInputs(published(ModelFolder, tiny_lm_dir.parent))


def corpus(folder: Path, count: int = 60, name: str = "main") -> Path:
    """Documents of 60 different words each, plus one text that spells the end-of-text token."""
    path = folder / f"{name}.jsonl"
    rows = [
        {"text": " ".join(f"{name}{doc}word{i}" for i in range(60)), "licence": "CC0-1.0"}
        for doc in range(count)
    ]
    rows[0]["text"] = "<|endoftext|>" + rows[0]["text"]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(folder: Path, **changes: object) -> IngestConfig:
    values: dict[str, object] = {
        "sources": [{"type": "local", "paths": [str(corpus(folder))]}],
        "ood_sources": [{"type": "local", "paths": [str(corpus(folder, 5, "other"))]}],
        "context_length": 32,
        "budget_tokens": BUDGETS,
        "fractions": {"train": 0.4, "validation": 0.2, "label": 0.2, "test": 0.2},
        "shard_sequences": 7,
    }
    return IngestConfig.model_validate(values | changes)


def test_splits_budgets_and_documents(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    ctx = context()
    output = STAGE.run(inputs, settings(tmp_path), ctx)
    tokenizer = load_tokenizer(inputs.model.model)
    documents = published(Corpus, ctx.out).documents.to_pylist()
    split_of = {row["doc_id"]: row["split"] for row in documents}
    texts = {}
    for name in ("main", "other"):
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            texts[hashlib.sha256(text.encode()).hexdigest()] = text
    for split, budget in BUDGETS.items():
        ids = read_tokens(ctx.out, split)
        assert ids.shape == (budget // 32, 32)
        assert output.metrics[f"tokens_{split}"] == budget
        table = read_token_table(ctx.out, split)
        assert table.column("seq_id").to_pylist() == list(range(len(ids)))
        owners = {doc for row in table.column("doc_ids").to_pylist() for doc in row}
        assert {split_of[doc] for doc in owners} == {split}
        # Oracle: the documents of the split, tokenised one by one and joined by EOS.
        rows = [row for row in documents if row["split"] == split]
        stream: list[int] = []
        for row in rows:
            encoded = tokenizer.backend_tokenizer
            encoded.encode_special_tokens = True
            stream += encoded.encode(texts[row["sha256"]], add_special_tokens=False).ids
            stream.append(tokenizer.eos_token_id)
        assert ids.flatten().tolist() == stream[: ids.size]
    assert len(list(ctx.out.glob("train-*.parquet"))) == 3
    provenance = published(Corpus, ctx.out).provenance
    assert provenance.sources["main.jsonl"].licences == ("CC0-1.0",)
    assert provenance.splits["test"].tokens == 128


def test_documents_end_where_eos_is(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    ctx = context()
    STAGE.run(inputs, settings(tmp_path), ctx)
    eos = load_tokenizer(inputs.model.model).eos_token_id
    table = read_token_table(ctx.out, "train").to_pylist()
    for row in table:
        ends = (np.flatnonzero(np.array(row["input_ids"]) == eos) + 1).tolist()
        assert row["doc_starts"] == [0, *(end for end in ends if end < 32)]


def test_same_bytes_twice_and_other_seed_differs(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ctx = context(name, seed=seed)
        STAGE.run(inputs, settings(tmp_path), ctx)
        contents.append({p.name: p.read_bytes() for p in sorted(ctx.out.iterdir())})
    assert contents[0] == contents[1]
    assert contents[0]["train-00000.parquet"] != contents[2]["train-00000.parquet"]


def test_a_killed_run_takes_up_its_shards(
    inputs: IngestInputs, context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of shards and windows, the bytes are the same; nothing is done twice."""
    budgets = {"train": 40_000, "validation": 64, "label": 64, "test": 20_000, "ood": 64}
    config = settings(tmp_path, budget_tokens=budgets)
    whole = context("whole")
    STAGE.run(inputs, config, whole)
    monkeypatch.setattr(text_shards, "SHARD_TEXTS", 4)
    monkeypatch.setattr(text_shards, "VOLUME_SHARDS", 6)
    monkeypatch.setattr(text_shards, "WINDOW_SHARDS", 3)
    monkeypatch.setattr(LocalExecutor, "is_here", False)
    computed: list[str] = []
    compute = TextWorker.compute

    def counted(self: TextWorker, number: int, advance: Callable[[float], None]) -> ReadyTexts:
        name = f"{self.settings.texts.name} {number}"
        if name == "texts-0001 2" and "killed" not in computed:
            computed.append("killed")
            raise KeyboardInterrupt
        computed.append(name)
        return compute(self, number, advance)

    monkeypatch.setattr(TextWorker, "compute", counted)
    ctx = context("parts")
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(inputs, config, ctx)
    assert computed[:-1] == [f"texts-0000 {n}" for n in range(6)] + ["texts-0001 0", "texts-0001 1"]
    shutil.rmtree(ctx.out)
    ctx.out.mkdir()
    STAGE.run(inputs, config, ctx)
    assert len(computed) - 1 == len({*computed} - {"killed"})
    for path in whole.out.iterdir():
        assert (ctx.out / path.name).read_bytes() == path.read_bytes()

    # Texts that are other ones by now, as a dataset without a revision may send, are read anew.
    computed.clear()
    again = tmp_path / "again"
    again.mkdir()
    text = ctx.progress / "texts-0000" / "ready-00001.safetensors"
    other = ctx.progress / "texts-0000" / "ready-00000.safetensors"
    text.write_bytes(other.read_bytes())
    sealed.seal_file(text, owner=f"texts-0000 {text.name}")
    STAGE.run(inputs, config, replace(ctx, out=again))
    assert computed == ["texts-0000 1"]


def test_duplicates_across_splits_go(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    """Twenty documents, each six times: every text ends up in one split only."""
    rows = [{"text": " ".join(f"d{i % 20}w{j}" for j in range(80))} for i in range(120)]
    path = tmp_path / "copies.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    ctx = context()
    config = settings(
        tmp_path,
        sources=[{"type": "local", "paths": [str(path)]}],
        budget_tokens={**BUDGETS, "train": 100_000, "ood": 0},
    )
    output = STAGE.run(inputs, config, ctx)
    removed = output.metrics["duplicates_removed"]
    assert isinstance(removed, int)
    assert removed > 0
    documents = published(Corpus, ctx.out).documents.to_pylist()
    splits_of_text: dict[str, set[str]] = {}
    for row in documents:
        splits_of_text.setdefault(row["sha256"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in splits_of_text.values())
    assert any("train holds" in note for note in ctx.report.notes)  # type: ignore[attr-defined]


def test_long_documents_are_read_on_where_their_beginnings_fill_no_split(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    """20 documents of 60 lines, cut at about 6: without their rest 9 in 10 tokens are lost."""
    path = tmp_path / "long.jsonl"
    rows = [{"text": "\n".join(f"w{doc}x{i} " * 6 for i in range(60))} for doc in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    base = {"sources": [{"type": "local", "paths": [str(path)]}], "ood_sources": []}
    roomy = {"train": 400_000, "validation": 0, "label": 0, "test": 400_000, "ood": 0}
    limits = {"max_document_chars": 300, "min_document_chars": 50}

    ctx, whole = context("roomy"), context("whole")
    read_on = STAGE.run(inputs, settings(tmp_path, **base, budget_tokens=roomy, **limits), ctx)
    assert read_on.reasons == ()
    STAGE.run(
        inputs, settings(tmp_path, **base, budget_tokens=roomy, max_document_chars=None), whole
    )
    provenance, expected = (published(Corpus, c.out).provenance for c in (ctx, whole))
    for split in ("train", "test"):
        found, all_tokens = (p.splits[split].tokens for p in (provenance, expected))
        assert found == pytest.approx(all_tokens, rel=0.1)
    documents = expected.splits["train"].documents + expected.splits["test"].documents
    assert provenance.continued_documents == documents
    notes = " ".join(ctx.report.notes)  # type: ignore[attr-defined]
    assert "were read on after their first 300 characters" in notes
    # All pieces of a document are in its split.
    splits: dict[str, set[str]] = {}
    for row in published(Corpus, ctx.out).documents.to_pylist():
        splits.setdefault(row["title"].split(" (part")[0], set()).add(row["split"])
    assert all(len(names) == 1 for names in splits.values())

    # Budgets that the beginnings fill see many documents, as before.
    small = {"train": 640, "validation": 0, "label": 0, "test": 64, "ood": 0}
    ctx = context("small")
    output = STAGE.run(inputs, settings(tmp_path, **base, budget_tokens=small, **limits), ctx)
    (caveat,) = output.reasons
    assert "of your documents were cut: after their first 300 characters" in caveat
    written = Corpus.provenance.path(ctx.out).read_text()
    assert "continued_documents" not in written
    assert "cut_characters" not in written


def test_one_long_file_reaches_every_split_under_a_caveat(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Chapter {i} of " + f"tale{i} " * 60 for i in range(150)))
    source = {"type": "local", "paths": [str(path)], "document_chars": 900}
    budget = {"train": 64_000, "validation": 64, "label": 64, "test": 64, "ood": 0}
    ctx = context()
    config = settings(
        tmp_path, sources=[source], ood_sources=[], budget_tokens=budget, max_document_chars=None
    )
    output = STAGE.run(inputs, config, ctx)
    rows = published(Corpus, ctx.out).documents.to_pylist()
    assert {row["split"] for row in rows} == {"train", "validation", "label", "test"}
    (caveat,) = output.reasons
    assert "the same 1 files as training text" in caveat


def test_what_the_limit_cut_off_is_said(
    inputs: IngestInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documentation of packages is not read on; the note says why a split is not full."""
    text = "\n".join(f"word{i} " * 6 for i in range(100))

    texts = {f"k{i}": text.replace("w", f"w{i}") for i in range(9)}
    found = [
        Candidate(key, lambda key=key: Document(key, key, "s", "MIT", texts[key]))  # type: ignore[misc]
        for key in texts
    ]
    monkeypatch.setattr("rldecoder.data.sources.pydocs_candidates", lambda *_: found)
    budget = {"train": 64_000, "validation": 0, "label": 0, "test": 0, "ood": 0}
    ctx = context()
    config = IngestConfig.model_validate(
        {"context_length": 32, "budget_tokens": budget, "max_document_chars": 500,
         "ood_sources": []}
    )  # fmt: skip
    STAGE.run(inputs, config, ctx)
    (note,) = [n for n in ctx.report.notes if "train holds" in n]  # type: ignore[attr-defined]
    assert "characters of its documents were cut off by `ingest.max_document_chars`" in note
    cut = published(Corpus, ctx.out).provenance.cut_characters
    assert cut is not None
    assert cut["train"] > 1000


def test_what_is_no_text_is_in_the_provenance(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [json.loads(line) for line in corpus(tmp_path).read_text().splitlines()]
    rows += [{"text": ["a list"]}, {"text": "x", "licence": "\ud83d"}, {"text": None}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "._a.jsonl").write_text("resource fork")
    (folder / "b.pdf").write_bytes(b"%PDF")
    ctx = context()
    STAGE.run(inputs, settings(tmp_path, sources=[{"type": "local", "paths": [str(folder)]}]), ctx)
    provenance = published(Corpus, ctx.out).provenance
    assert provenance.dropped_documents["not_text"] == 1
    assert provenance.dropped_documents["no_text"] == 1
    assert provenance.left_out_files == {".pdf": 1, "hidden": 1}
    notes = " ".join(ctx.report.notes)  # type: ignore[attr-defined]
    assert "1 .pdf" in notes
    assert "1 not text" in notes


def test_python_corpus_by_default(inputs: IngestInputs, context: MakeContext) -> None:
    ctx = context()
    config = IngestConfig.model_validate(
        {
            "sources": [{"type": "pydocs", "packages": []}],
            "context_length": 64,
            "budget_tokens": {**BUDGETS, "label": 128},
        }
    )
    STAGE.run(inputs, config, ctx)
    licences = set(published(Corpus, ctx.out).documents.column("licence").to_pylist())
    assert licences == {"PSF-2.0"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_document_chars": 100_000}, "corpus is empty"),
        ({"budget_tokens": {**BUDGETS, "label": 31}}, "split `label` is 31 tokens"),
        ({"ood_sources": []}, "no source fills it"),
        ({"context_length": 4096, "budget_tokens": {"train": 9999}}, "positions for 512"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path,
    inputs: IngestInputs,
    context: MakeContext,
    changes: dict[str, object],
    message: str,
) -> None:
    if changes.get("context_length"):
        changes["budget_tokens"] = dict.fromkeys(BUDGETS, 9999)
    with pytest.raises(BadInputError, match=message):
        STAGE.run(inputs, settings(tmp_path, **changes), context())


def test_too_few_documents_for_the_splits(
    tmp_path: Path, inputs: IngestInputs, context: MakeContext
) -> None:
    path = tmp_path / "one.txt"
    path.write_text(" ".join(f"word{i}" for i in range(400)))
    config = settings(tmp_path, sources=[{"type": "local", "paths": [str(path)]}])
    with pytest.raises(BadInputError, match=r"got no sequence.*document_separator"):
        STAGE.run(inputs, config, context())


def test_fractions_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match=r"sum to 1\.1"):
        IngestConfig.model_validate(
            {"fractions": {"train": 0.8, "validation": 0.1, "label": 0.1, "test": 0.1}}
        )


def test_text_begins_as_prompts_do(tiny_lm_dir: Path, tmp_path: Path, context: MakeContext) -> None:
    with_tokens_around(tiny_lm_dir, tmp_path / "sync" / "model", bos=True, eos=True)
    inputs = IngestInputs(published(ModelFolder, tmp_path / "sync"))
    ctx = context()
    STAGE.run(inputs, settings(tmp_path), ctx)
    tokenizer = load_tokenizer(inputs.model.model)
    rows = np.concatenate([read_tokens(ctx.out, split) for split in BUDGETS])
    assert (rows[:, 0] == BOS).all()
    ends = rows[:, :-1] == tokenizer.eos_token_id
    assert ends.any()
    assert (rows[:, 1:][ends] == BOS).all()
    # A document begins as a prompt of its text does.
    lines = (tmp_path / "main.jsonl").read_text().splitlines()[1:]
    prompts = [encode_prompt(tokenizer, json.loads(line)["text"])[:8] for line in lines]
    starts = [row[i : i + 8] for row in rows.tolist() for i, t in enumerate(row) if t == BOS]
    assert sum(prompt in starts for prompt in prompts) > 3
    # Without such a token nothing is put in front.
    plain = context()
    without = IngestInputs(published(ModelFolder, tiny_lm_dir.parent))
    STAGE.run(without, settings(tmp_path), plain)
    assert (read_tokens(plain.out, "train")[:, 0] != BOS).all()


def test_documents_of_a_tokenizer_that_ends_none_are_parted_by_their_beginnings(
    tiny_lm_dir: Path, tmp_path: Path, context: MakeContext
) -> None:
    with_tokens_around(tiny_lm_dir, tmp_path / "sync" / "model", bos=True)
    inputs = IngestInputs(published(ModelFolder, tmp_path / "sync"))
    ctx = context()
    STAGE.run(inputs, settings(tmp_path), ctx)
    eos = load_tokenizer(inputs.model.model).eos_token_id
    rows = read_token_table(ctx.out, "train").to_pylist()
    assert max(len(row["doc_starts"]) for row in rows) > 1
    for row in rows:
        assert eos not in row["input_ids"]
        starts = np.flatnonzero(np.array(row["input_ids"]) == BOS).tolist()
        assert row["doc_starts"] == starts
    assert published(Corpus, ctx.out).provenance.separator == (BOS,)
    # Said only where it is so.
    plain = context("plain")
    STAGE.run(IngestInputs(published(ModelFolder, tiny_lm_dir.parent)), settings(tmp_path), plain)
    assert "separator" not in Corpus.provenance.path(plain.out).read_text()

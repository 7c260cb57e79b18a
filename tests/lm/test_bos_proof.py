"""`ingest.bos` reaches texts of every kind, and what it costs is measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rldecoder.config.data import Bos
from rldecoder.data.packing import PackedSequence, SequencePacker
from rldecoder.errors import BadInputError
from rldecoder.explain.prompts import tokenize_prompt
from rldecoder.lm.bos_proof import BosRecord, measure_bos
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import (
    encode_documents,
    encode_prompt,
    encode_prompts,
    set_bos,
    tokens_between,
    tokens_in_front,
)
from rldecoder.lm.tokenizer_parity import check_parity
from tests.tiny_models import BOS, TINY_RECORD, with_tokens_around

TEXT = "The key is in the"


def with_own_bos(folder: Path, target: Path, *, adds: bool) -> Path:
    """A model whose tokenizer has a BOS token of its own, and may put it before texts."""
    with_tokens_around(folder, target, bos=adds)
    tokenizer = AutoTokenizer.from_pretrained(target)
    kept = tokenizer.backend_tokenizer.post_processor
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.backend_tokenizer.post_processor = kept
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module", params=[False, True], ids=["silent", "adding"])
def model_dir(
    request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return with_own_bos(
        tiny_llama_dir, tmp_path_factory.mktemp("bos") / "model", adds=request.param
    )


@pytest.mark.parametrize("setting", ["auto", "always", "never"])
def test_the_setting_reaches_every_text(model_dir: Path, setting: Bos, tmp_path: Path) -> None:
    published = AutoTokenizer.from_pretrained(model_dir)
    adds = published(TEXT)["input_ids"][0] == BOS
    wanted = {"auto": adds, "always": True, "never": False}[setting]
    record = tmp_path / "model.json"
    TINY_RECORD.model_copy(update={"bos": setting}).save(record)
    lm = FrozenLM.load(model_dir, record=record)
    front = [BOS] * wanted
    bare = published.encode(TEXT, add_special_tokens=False)

    assert list(lm.front) == tokens_in_front(lm.tokenizer) == front
    assert lm.encode_prompt(TEXT) == encode_prompt(lm.tokenizer, TEXT) == front + bare
    assert encode_prompts(lm.tokenizer, [TEXT], 4) == [front + bare[-(4 - len(front)) :]]
    assert tokenize_prompt(lm, TEXT).tolist() == front + bare
    assert encode_documents(lm.tokenizer, [TEXT]) == [bare]
    # And what is saved with it, in an export or by hand.
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokens_in_front(saved) == front


def test_always_needs_a_token(tiny_llama_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.bos_token = None
    with pytest.raises(BadInputError, match="no beginning-of-text token"):
        set_bos(tokenizer, "always")
    set_bos(tokenizer, "never")
    assert tokens_in_front(tokenizer) == []


def test_one_token_parts_texts_where_end_and_beginning_are_the_same() -> None:
    packer = SequencePacker(4, 9, [], [0])
    assert [packer.add(number, "s", [5, 6]) for number in range(3)] == [3, 3, 3]
    assert [row.input_ids.tolist() for row in packer.take()] == [[0, 5, 6, 0], [0, 5, 6, 0]]


def test_a_record_says_how_a_text_begins_only_where_it_was_set() -> None:
    assert "bos" not in TINY_RECORD.model_dump(mode="json")
    assert TINY_RECORD.model_copy(update={"bos": "never"}).model_dump()["bos"] == "never"


@pytest.mark.parametrize("setting", ["auto", "always", "never"])
def test_both_ways_are_measured(model_dir: Path, setting: Bos) -> None:
    lm = FrozenLM.load(model_dir)
    set_bos(lm.tokenizer, setting)
    found = measure_bos(lm, setting)
    assert found.measured == (BOS,)
    assert found.in_front == lm.front
    assert (found.windows, found.tokens) == (4, 4 * 127)
    # The same predictions with and without, by the plain definition.
    text_ids = windows_of(lm.tokenizer)
    for front, said in (([BOS], found.cross_entropy_with), ([], found.cross_entropy_without)):
        losses = []
        for row in text_ids:
            ids = torch.tensor([[*front, *row]])
            with torch.no_grad():
                logits = lm.model(input_ids=ids, use_cache=False).logits[0, len(front) : -1]
            losses.append(F.cross_entropy(logits, ids[0, len(front) + 1 :]))
        assert said == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


def windows_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in ("class", "exceptions", "strings"))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [ids[start : start + 128] for start in range(0, 512, 128)]


def test_nothing_is_measured_without_such_a_token(tiny_llama_dir: Path) -> None:
    lm = FrozenLM.load(tiny_llama_dir)
    lm.tokenizer.bos_token = None
    found = measure_bos(lm, "auto")
    assert (found.measured, found.windows, found.cross_entropy_with) == ((), 0, None)
    assert found.warning is None
    assert found.headline == {}


def record(in_front: tuple[int, ...], with_bos: float, without: float) -> BosRecord:
    return BosRecord(
        setting="auto", in_front=in_front, measured=(BOS,), windows=4, tokens=508,
        cross_entropy_with=with_bos, cross_entropy_without=without,
    )  # fmt: skip


def test_the_worse_way_is_warned_of() -> None:
    said = record((), 2.81, 3.90).warning
    assert said is not None
    assert "1.09 nats a token more without" in said
    assert "`ingest.bos: always`" in said
    said = record((BOS,), 3.0, 2.5).warning
    assert said is not None
    assert "0.50 nats a token more with" in said
    assert "`ingest.bos: never`" in said
    assert record((BOS,), 2.81, 3.90).warning is None
    assert record((), 2.5, 2.59).warning is None  # within a tenth


@torch.no_grad()
def test_packed_text_costs_a_trained_model_what_its_tokenizer_s_own_way_does(
    shared_data: Path,
) -> None:
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("no trained model with a BOS token here")
    lm = FrozenLM.load(folder)
    assert lm.front == (1,)
    assert check_parity(lm).reads_english
    # Texts of its own, in its own words: what it was trained on is not here.
    torch.manual_seed(0)
    start = torch.full((24, 1), 1)
    told = lm.model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=160, top_k=0,
        pad_token_id=lm.eos_token_id,
    )  # fmt: skip
    texts = lm.tokenizer.batch_decode(told, skip_special_tokens=True)
    for setting, as_its_own in (("auto", True), ("never", False)):
        set_bos(lm.tokenizer, setting)
        between = tokens_between(lm.tokenizer)
        assert between == ([] if as_its_own else [lm.eos_token_id])
        for ends in [between, [lm.eos_token_id]] if as_its_own else [between]:
            packer = SequencePacker(256, 10**6, ends, tokens_in_front(lm.tokenizer))
            for number, text in enumerate(texts):
                packer.add(number, "s", encode_documents(lm.tokenizer, [text])[0])
            rows = packer.take()
            assert max(len(row.doc_starts) for row in rows) > 2
            # Its tokenizer's own way: each piece alone, what it puts in front of a text before it.
            apart = packed, own = cross_entropies(lm, rows)
            equal = as_its_own and ends == between
            assert (abs(packed - own) < 0.02) == equal, (setting, ends, apart)


def cross_entropies(lm: FrozenLM, rows: list[PackedSequence]) -> tuple[float, float]:
    """Nats a token of the texts in rows by the model's own logits: as packed, and each piece read
    alone behind a beginning-of-text token."""
    packed, alone = [], []
    for row in rows:
        ids = row.input_ids.tolist()
        in_row = losses(lm, ids)
        for begin, end in itertools.pairwise([*row.doc_starts, len(ids)]):
            text = [place for place in range(begin, end) if ids[place] > 2]
            alone.append(losses(lm, [1, *(ids[place] for place in text)])[text[0] == 0 :])
            packed.append(in_row[[place - 1 for place in text if place]])
    return float(torch.cat(packed).mean()), float(torch.cat(alone).mean())


def losses(lm: FrozenLM, ids: list[int]) -> torch.Tensor:
    """[T - 1] nats that each token but the first costs."""
    row = torch.tensor([ids])
    logits = lm.model(input_ids=row, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, row[0, 1:], reduction="none")

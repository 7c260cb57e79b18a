"""A tokenizer that belongs to its model passes; each way of not belonging is found."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoTokenizer

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.random_model import make_random_model
from rldecoder.lm.tokenizer_parity import (
    PROBES,
    ParityRecord,
    check_parity,
    hash_files,
    require_parity,
    require_vocabulary,
    vocabulary_sha256,
)


@pytest.fixture
def lm(tiny_lm_dir: Path) -> FrozenLM:
    return FrozenLM.load(tiny_lm_dir)


@pytest.fixture
def stories(shared_data: Path) -> FrozenLM:
    """A tiny model that was trained on English."""
    return FrozenLM.load(shared_data / "models" / "stories260K")


def test_a_fitting_tokenizer_passes(lm: FrozenLM, tmp_path: Path) -> None:
    report = check_parity(lm, ["my own probe ✓"])
    require_parity(report, "tiny", trained=False)
    assert report.problems == report.remarks == ()
    assert len(report.probes) == len(PROBES) + 1
    assert all(probe.lossless and probe.decoded == probe.text for probe in report.probes)
    assert (report.tokenizer_size, report.highest_token_id, report.padding_rows) == (512, 511, 0)
    assert report.special_tokens["eos"] == 0
    assert report.uniform_cross_entropy == pytest.approx(math.log(512))
    report.save(tmp_path / "parity.json")
    assert ParityRecord.load(tmp_path / "parity.json") == report


def test_the_probes_cover_what_breaks_tokenizers() -> None:
    text = "".join(PROBES)
    for piece in (
        "🙂",
        "\u200d",
        "e\u0301",
        "\t",
        "\r\n",
        "  ",
        "def f",
        "\u200b",
        "東京",
        "العربية",
    ):
        assert piece in text


def test_tokenizer_larger_than_the_embedding(lm: FrozenLM, tmp_path: Path) -> None:
    larger = make_random_model(tmp_path / "larger", n_layer=1, vocab_size=600)
    lm.tokenizer = AutoTokenizer.from_pretrained(larger)
    with pytest.raises(BadInputError, match="token id 599 has no row in the model's 512"):
        require_parity(check_parity(lm), "tiny", trained=False)


def test_padded_vocabulary_is_fine_and_reported(tiny_lm_dir: Path, tmp_path: Path) -> None:
    larger = make_random_model(tmp_path / "larger", n_layer=1, vocab_size=600)
    padded = FrozenLM.load(larger)
    padded.tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    report = check_parity(padded)
    require_parity(report, "padded", trained=False)
    assert report.padding_rows == 88


def test_text_that_does_not_come_back(lm: FrozenLM) -> None:
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    report = check_parity(lm)
    with pytest.raises(BadInputError, match="comes back as") as caught:
        require_parity(report, "tiny", trained=False)
    assert "non\\xa0breaking" in caught.value.why
    assert "allow_lossy_tokenizer" in caught.value.mend
    require_parity(report, "tiny", trained=False, lossy=True)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "Lowercase", "StripAccents"])
def test_a_unicode_normal_form_loses_nothing_but_other_changes_do(
    tiny_lm_dir: Path, tmp_path: Path, form: str
) -> None:
    shutil.copytree(tiny_lm_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)()
    tokenizer.save_pretrained(tmp_path / "model")
    report = check_parity(FrozenLM.load(tmp_path / "model"))
    if form in ("NFC", "NFD"):
        require_parity(report, "tiny", trained=False)
        assert any("normal form" in remark for remark in report.remarks)
    elif form != "StripAccents":  # which strips only what is written as a code point of its own
        with pytest.raises(BadInputError, match="comes back as"):
            require_parity(report, "tiny", trained=False)


def test_many_problems_are_counted(lm: FrozenLM) -> None:
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(BadInputError, match=r"\(and \d more\)"):
        require_parity(check_parity(lm), "tiny", trained=False)


def test_no_end_of_text(lm: FrozenLM) -> None:
    lm.tokenizer.eos_token = None
    with pytest.raises(BadInputError, match="no end-of-text token"):
        require_parity(check_parity(lm), "tiny", trained=False)


def test_special_tokens_that_disagree_are_remarked(lm: FrozenLM) -> None:
    lm.model.config.eos_token_id = 7
    lm.model.generation_config.eos_token_id = [8, 9]
    report = check_parity(lm)
    assert report.model_special_tokens["eos"] == [7, 8, 9]
    assert report.remarks == ("the tokenizer's eos token is 0, the model's config says [7, 8, 9]",)
    require_parity(report, "tiny", trained=False)


def test_a_trained_model_reads_english_only_by_its_own_tokenizer(
    stories: FrozenLM, tiny_lm_dir: Path
) -> None:
    own = check_parity(stories)
    require_parity(own, "stories", trained=True)
    assert own.english_cross_entropy < 4.0 < own.uniform_cross_entropy
    # Same size, lossless, every id in range: only the model itself can tell.
    stories.tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    foreign = check_parity(stories)
    assert foreign.problems == ()
    with pytest.raises(BadInputError, match="plain English costs the model"):
        require_parity(foreign, "stories", trained=True)


def test_english_cross_entropy_is_the_models_own_loss(stories: FrozenLM) -> None:
    from rldecoder.lm.tokenizer_parity import _ENGLISH

    ids = torch.tensor([stories.tokenizer.encode(_ENGLISH, add_special_tokens=False)])
    loss = stories.model(ids, labels=ids).loss.item()
    assert check_parity(stories).english_cross_entropy == pytest.approx(loss, rel=1e-4)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes(b"{}")
    (tmp_path / "merges.txt").write_bytes(b"a b")
    good = hashlib.sha256(b"{}").hexdigest()
    found = hash_files([tmp_path / "vocab.json", tmp_path / "merges.txt"], {"vocab.json": good})
    assert {name: item.size_bytes for name, item in found.items()} == {
        "vocab.json": 2,
        "merges.txt": 3,
    }
    assert found["vocab.json"].sha256 == good
    assert found["vocab.json"].status == "matches the published hash"
    assert found["merges.txt"].status == "no published hash"
    with pytest.raises(DamagedFileError, match=r"merges\.txt has SHA-256 .* published one is 000"):
        hash_files([tmp_path / "merges.txt"], {"merges.txt": "0" * 64})


def test_vocabulary_hash_depends_on_the_table_alone(
    lm: FrozenLM, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    mine = vocabulary_sha256(lm.tokenizer)
    assert mine == vocabulary_sha256(AutoTokenizer.from_pretrained(tiny_llama_dir))
    text = (lm.folder / "tokenizer.json").read_text()
    other = tmp_path / "other"
    lm.tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=7))
    assert mine == vocabulary_sha256(AutoTokenizer.from_pretrained(other))
    require_vocabulary(mine, mine, "tiny")
    require_vocabulary(mine, None, "tiny")
    with pytest.raises(DamagedFileError, match="spec pins 0000"):
        require_vocabulary(mine, "0" * 64, "tiny")

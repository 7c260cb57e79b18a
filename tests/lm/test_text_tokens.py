"""Documents and prompts are tokenised alike, and every end token ends an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rldecoder.errors import BadInputError
from rldecoder.evals.generation import prefix_generate
from rldecoder.evals.prompts import make_prompts
from rldecoder.evals.tasks import run_task
from rldecoder.explain.prompts import tokenize_prompt
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import (
    answer_texts,
    encode_documents,
    encode_prompt,
    encode_prompts,
    end_token_ids,
    tokens_between,
    tokens_in_front,
)
from tests.tiny_models import BOS, with_tokens_around

EOS = 0


@pytest.fixture(scope="module", params=["plain", "bos", "eos", "both"])
def tokenizer(
    request: pytest.FixtureRequest, tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    bos, eos = request.param in ("bos", "both"), request.param in ("eos", "both")
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    tokenizer = AutoTokenizer.from_pretrained(
        with_tokens_around(tiny_lm_dir, folder, bos=bos, eos=eos)
    )
    ids = tokenizer("a b")["input_ids"]
    assert (ids[0] == BOS, ids[-1] == EOS) == (bos, eos)
    tokenizer.test_front = [BOS] * bos
    return tokenizer


def test_prompts_begin_as_the_tokenizer_says_and_have_no_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    front = tokenizer.test_front
    assert tokens_in_front(tokenizer) == front
    # Packed, documents end as the tokenizer's own do; what begins the next one parts them else.
    silent = front and tokenizer("a b")["input_ids"][-1] != EOS
    assert tokens_between(tokenizer) == ([] if silent else [EOS])
    text = "The key is in the"
    bare = tokenizer.encode(text, add_special_tokens=False)
    assert encode_prompt(tokenizer, text) == front + bare
    assert encode_prompts(tokenizer, ["", text]) == [front, front + bare]
    # Documents are given alone; a text that spells a special token stays text.
    spelled = "over <|endoftext|> and on"
    assert encode_documents(tokenizer, [text])[0] == bare
    assert EOS not in encode_documents(tokenizer, [spelled])[0]
    assert EOS in encode_prompt(tokenizer, spelled)


def test_a_long_prompt_keeps_its_end_and_what_is_in_front(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = "The key is in the box. The hat is in the bag."
    (row,) = encode_prompts(tokenizer, [text], longest=6)
    front = tokenizer.test_front
    assert len(row) == 6
    assert row[: len(front)] == front
    assert row[len(front) :] == encode_prompt(tokenizer, text)[len(front) - 6 :]


class OddTokenizer:
    name_or_path = "odd"

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: object
    ) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 4] if add_special_tokens else [2, 3]}


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    with pytest.raises(BadInputError, match="odd tokenises a text otherwise once its special"):
        tokens_in_front(OddTokenizer())


@pytest.mark.parametrize("eos", [False, True])
def test_no_prompt_of_a_task_or_of_explain_ends_in_the_end(
    tiny_lm_dir: Path, tmp_path: Path, eos: bool
) -> None:
    lm = FrozenLM.load(with_tokens_around(tiny_lm_dir, tmp_path / "model", bos=True, eos=eos))
    seen: list[torch.Tensor] = []

    def generate(**kwargs: torch.Tensor) -> torch.Tensor:
        seen.append(kwargs["input_ids"])
        return kwargs["input_ids"]

    prompts = make_prompts("cloze", "test", 2, 0)
    run_task(generate, prompts, lm.tokenizer)
    for row, prompt in zip(seen[0], prompts, strict=True):
        expected = [BOS, *lm.tokenizer.encode(prompt.prompt, add_special_tokens=False)]
        assert row[-len(expected) :].tolist() == expected
    assert tokenize_prompt(lm, "a b").tolist()[0] == BOS
    assert EOS not in tokenize_prompt(lm, "a b").tolist()
    assert tokenize_prompt(lm, "a").tolist() == lm.encode_prompt("a")
    with pytest.raises(BadInputError, match="The prompt is empty"):
        tokenize_prompt(lm, "")


def test_all_ends_of_the_model_count(tiny_lm_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    for named, expected in ((None, [0]), (0, [0]), (7, [0, 7]), ([9, 7], [0, 7, 9])):
        assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=named)) == expected
    assert end_token_ids(tokenizer, None) == [0]
    tokenizer.eos_token = None
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=7)) == [7]


@pytest.mark.parametrize("named", ["abc", 1.5, [0, "x"], [[0]], True])
def test_an_end_that_is_no_token_is_refused(tiny_lm_dir: Path, named: Any) -> None:
    """Rounded or cut into digits it would be another token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    settings = GenerationConfig()
    settings.eos_token_id = named
    with pytest.raises(BadInputError, match="eos_token_id"):
        end_token_ids(tokenizer, settings)
    settings.eos_token_id = [-1, 5]
    assert end_token_ids(tokenizer, settings) == [0, 5]


def test_an_answer_ends_at_any_of_them(tiny_lm_dir: Path) -> None:
    prompts = make_prompts("cloze", "test", 6, 0)
    lm = FrozenLM.load(tiny_lm_dir)
    rows: list[list[int]] = []

    def noted(**kwargs: Any) -> torch.Tensor:
        out = prefix_generate(lm.model)(**kwargs)
        rows.extend(out[:, kwargs["input_ids"].shape[1] :].tolist())
        return out

    before = run_task(noted, prompts, lm.tokenizer, stop_ids=[])
    # A second end, as Llama 3 has: a token in the middle of some answer.
    end = next(row[j] for row in rows for j in (2, 1) if row[j] not in [*row[:j], EOS])
    expected = [
        lm.tokenizer.decode(row[: row.index(end)] if end in row else row, skip_special_tokens=True)
        for row in rows
    ]
    assert expected != [row.completion for row in before.rows]
    lm.model.generation_config.eos_token_id = [EOS, end]
    assert lm.end_token_ids == sorted([EOS, end])
    for generate in (prefix_generate(lm.model), lm.model.generate):
        after = run_task(generate, prompts, lm.tokenizer, stop_ids=[], end_ids=lm.end_token_ids)
        assert [row.completion for row in after.rows] == expected


def test_ends_are_no_part_of_an_answer(tiny_lm_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    ids = tokenizer.encode("in the box", add_special_tokens=False)
    assert answer_texts(tokenizer, [[*ids, 7, 0, 0]], [0, 7]) == ["in the box"]
    assert answer_texts(tokenizer, [[*ids, 7]], [0]) == ["in the box" + tokenizer.decode([7])]

"""Shared-prefix generation equals plain `generate`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rldecoder.evals.generation import newline_token_ids, prefix_generate, split_prefix
from rldecoder.lm.frozen import FrozenLM


@pytest.fixture(params=["gpt2", "llama"])
def lm(request, tiny_lm_dir, tiny_llama_dir):
    return FrozenLM.load(tiny_lm_dir if request.param == "gpt2" else tiny_llama_dir)


@pytest.mark.parametrize("shared", [0, 6])
def test_equals_generate(lm, shared):
    """Ragged prompts, with and without a common prefix, absolute and rotary positions."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(3, 500, (shared,), generator=generator).tolist()
    rests = [torch.randint(3, 500, (n,), generator=generator).tolist() for n in (1, 4, 9)]
    rests = [[7 + i, *rest] for i, rest in enumerate(rests)]
    rows = [prefix + rest for rest in rests]
    width = max(map(len, rows))
    ids = torch.tensor([[lm.pad_token_id] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    # a stop token that the greedy continuation does meet, for one row at least
    plain = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 8,
        "pad_token_id": lm.pad_token_id,
    }
    free = lm.model.generate(**plain, do_sample=False, eos_token_id=[511])
    stops = [int(free[0, width + 2]), 511]
    expected = lm.model.generate(**plain, do_sample=False, eos_token_id=stops)
    found = prefix_generate(lm.model)(**plain, eos_token_id=stops)
    assert torch.equal(found, expected)


def test_sampling_is_refused(lm):
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="greedy"):
        prefix_generate(lm.model)(
            input_ids=ids, attention_mask=ids, max_new_tokens=1, eos_token_id=[0],
            pad_token_id=0, do_sample=True,
        )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=4))
def test_split_loses_nothing(rows):
    batch = split_prefix(rows, pad_token_id=0)
    assert batch.suffix.shape[1] >= 1
    assert batch.mask[:, -1].all()
    for i, row in enumerate(rows):
        whole = torch.cat([batch.prefix[0], batch.suffix[i]])
        assert whole[batch.mask[i].bool()].tolist() == row
        positions = batch.suffix_positions[i][batch.mask[i, batch.prefix.shape[1] :].bool()]
        assert positions.tolist() == list(range(batch.prefix.shape[1], len(row)))


def test_newline_tokens(lm):
    ids = newline_token_ids(lm.tokenizer)
    assert lm.tokenizer("\n")["input_ids"][-1] in ids
    assert lm.tokenizer("a")["input_ids"][-1] not in ids

"""The task runner: order, batching, stopping, intervals."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.evals.generation import prefix_generate
from rldecoder.evals.prompts import make_prompts
from rldecoder.evals.statistics import wilson_interval
from rldecoder.evals.tasks import run_task, summarise
from rldecoder.sae.model import Sae, SaeSpec


@pytest.fixture
def prompts():
    addition = make_prompts("addition", "test", 3, 0)
    cloze = make_prompts("cloze", "test", 4, 0)
    return [cloze[0], addition[0], cloze[1], addition[1], cloze[2], cloze[3], addition[2]]


def oracle(prompts, tokenizer, wrong=()):
    """A `generate` that knows the answers (but not those in `wrong`)."""
    answers = {tuple(tokenizer(p.prompt)["input_ids"]): p.answer for p in prompts if p not in wrong}

    def generate(*, input_ids, attention_mask, max_new_tokens, eos_token_id, pad_token_id, **_):
        out = []
        for ids, keep in zip(input_ids, attention_mask, strict=True):
            answer = answers.get(tuple(ids[keep.bool()].tolist()), "nowhere")
            text = f" The answer is {answer}." if answer.isdigit() else f" {answer}."
            out.append(tokenizer(text)["input_ids"])
        width = max(map(len, out))
        new = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in out])
        return torch.cat([input_ids, new], dim=1)

    return generate


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_in_the_order_of_the_prompts(lm, prompts, batch_size):
    wrong = (prompts[1], prompts[4])
    result = run_task(
        oracle(prompts, lm.tokenizer, wrong), prompts, lm.tokenizer, batch_size=batch_size
    )
    assert result.scores == [1, 0, 1, 1, 0, 1, 1]
    assert [row.answer for row in result.rows] == [prompt.answer for prompt in prompts]
    assert (result.score, result.n) == (pytest.approx(5 / 7), 7)
    assert (result.ci_low, result.ci_high) == wilson_interval(5, 7)
    assert result.of_task("addition").scores == [0, 1, 1]


def test_batches_hold_one_task_each(lm, prompts):
    widths = []

    def spy(**kwargs):
        texts = lm.tokenizer.batch_decode(kwargs["input_ids"])
        widths.append({("Where is" in text) for text in texts})
        return oracle(prompts, lm.tokenizer)(**kwargs)

    run_task(spy, prompts, lm.tokenizer, batch_size=16)
    assert widths == [{True}, {False}]


def test_frozen_model_and_decoder_run_by_either_generate(lm, prompts):
    spec = SaeSpec(d_model=lm.d_model, num_latents=96, k=16, hook_layer=2)
    decoder = new_decoder(lm, Sae.random_init(spec, seed=0))
    for model in (lm.model, decoder):
        fast = run_task(prefix_generate(model), prompts, lm.tokenizer)
        slow = run_task(model.generate, prompts, lm.tokenizer)
        assert fast == slow
        # The token that ends an answer may hold spaces beside its line break, and is the last.
        assert not any(row.completion.partition("\n")[2].strip() for row in fast.rows)


def test_no_rows_is_not_a_division_by_zero():
    empty = summarise([])
    assert (empty.score, empty.n, empty.ci_low, empty.ci_high) == (0.0, 0, 0.0, 1.0)

"""Sampling: latents, masks and states must be exactly what a second look would find."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.nn import functional as F

from rldecoder.errors import NumericalError
from rldecoder.evals.generation import split_prefix
from rldecoder.evals.prompts import TaskPrompt, make_prompts, score
from rldecoder.evals.task_text import solution
from rldecoder.rl.policy import token_stats
from rldecoder.rl.rollout import DecoderSampler, draw
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import torch_generator


@pytest.fixture(params=["gpt2", "llama"])
def decoder(request, make_decoder, tiny_llama_dir):
    return make_decoder(scale=0.05, folder=tiny_llama_dir if request.param == "llama" else None)


@pytest.fixture
def prompts() -> list[TaskPrompt]:
    """Tasks in turn, so that two groups of different lengths are merged; ragged prompts."""
    pairs = zip(
        make_prompts("addition", "train", 3, 0), make_prompts("cloze", "train", 3, 0), strict=True
    )
    return [prompt for pair in pairs for prompt in pair]


def rows_of(rollout, decoder):
    """Each row's tokens (prompt and response) without any padding."""
    tokenizer = decoder.frozen.lm.tokenizer
    for i, prompt in enumerate(rollout.prompts):
        ids = tokenizer(prompt.prompt)["input_ids"]
        response = rollout.token_ids[i][rollout.mask[i].bool()].tolist()
        yield i, torch.tensor([ids + response]), len(ids), len(response)


def test_rollouts_equal_an_unpadded_uncached_pass(decoder, prompts):
    """Prefix cache, left padding, position ids and merging leave no trace."""
    rollout = DecoderSampler(decoder)(prompts, torch_generator(0))
    assert rollout.frozen_hidden is not None
    for i, ids, start, length in rows_of(rollout, decoder):
        states = slice(start - 1, start - 1 + length)
        seen = decoder.features(ids).latents
        sampled = decoder.hidden(
            SparseLatents(rollout.latents.acts[i, :length], rollout.latents.indices[i, :length])
        )
        expected = decoder.hidden(SparseLatents(seen.acts[0, states], seen.indices[0, states]))
        torch.testing.assert_close(sampled, expected, atol=1e-4, rtol=1e-4)
        _, final = decoder.frozen.lm.resid_and_final(ids, 2)
        torch.testing.assert_close(
            rollout.frozen_hidden[i, :length], final[0, states], atol=1e-4, rtol=1e-4
        )


def test_every_frozen_block_and_the_sae_see_a_token_once(decoder, prompts, monkeypatch):
    """Sampling, scoring by the frozen model, and the prefixes of later rollouts included."""
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    seen, encoded = [0] * lm.num_layers, []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: encoded.append(x.shape[:2].numel()) or encode(x))

    def count(index, args, kwargs):
        seen[index] += (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()

    sampler = DecoderSampler(decoder)
    with ExitStack() as hooks:
        for index, block in enumerate(lm._blocks):
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: count(index, args, kwargs), with_kwargs=True
            )
            hooks.callback(handle.remove)
        for first in (True, False):
            rollout = sampler(prompts, torch_generator(int(first)))
            expected = 0
            for task in ("addition", "cloze"):
                rows = [i for i, prompt in enumerate(prompts) if prompt.task == task]
                ids = [lm.tokenizer(prompts[i].prompt)["input_ids"] for i in rows]
                batch = split_prefix(ids, 0)
                length = int(rollout.mask[rows].sum(-1).max())
                expected += batch.suffix.numel() + len(rows) * (length - 1)
                expected += batch.prefix.numel() if first else 0
            assert [*seen, sum(encoded)] == [expected] * (lm.num_layers + 1)
            seen[:] = [0] * lm.num_layers
            encoded.clear()


@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_a_kept_prefix_changes_nothing(make_decoder, prompts, blocks):
    """Also where the decoder's own blocks have learnt something between two rollouts."""
    decoder = make_decoder(scale=0.3, blocks=blocks)
    sampler = DecoderSampler(decoder)
    sampler(prompts, torch_generator(1))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch_generator(2)))
    kept, anew = (
        which(prompts, torch_generator(0)) for which in (sampler, DecoderSampler(decoder))
    )
    assert torch.equal(kept.token_ids, anew.token_ids)
    assert torch.equal(kept.latents.acts, anew.latents.acts)
    assert torch.equal(kept.frozen_hidden, anew.frozen_hidden)


def test_masks_end_at_the_first_stop_token(decoder, prompts):
    sampler = DecoderSampler(decoder)
    rollout = sampler(prompts, torch_generator(1))
    stops = set(sampler.stop_ids.tolist())
    assert decoder.frozen.lm.eos_token_id in stops
    limits = {"addition": 20, "cloze": 4}
    for i, prompt in enumerate(prompts):
        length = int(rollout.mask[i].sum())
        tokens = rollout.token_ids[i, :length].tolist()
        assert not stops & set(tokens[:-1])
        assert (tokens[-1] in stops) == bool(rollout.finished[i])
        assert rollout.finished[i] or length == limits[prompt.task]
        assert (rollout.mask[i, :length] == 1).all()
        assert (rollout.latents.acts[i, length:] == 0).all()


def test_an_answer_that_ends_at_once_is_one_token(decoder, prompts):
    """The end token is counted, what follows is masked, also where it equals the padding."""
    sampler = DecoderSampler(decoder)
    unembedding = decoder.frozen.lm.unembedding
    end = int(sampler.stop_ids[unembedding[sampler.stop_ids].norm(dim=-1).argmax()])
    sampler.pad_token_id = end
    with torch.no_grad():
        decoder.W.zero_()
        decoder.b.copy_(unembedding[end] * 1e4)
    rollout = sampler(prompts, torch_generator(0))
    assert (rollout.token_ids == end).all()
    assert rollout.mask.sum(-1).tolist() == [1] * len(prompts)
    assert rollout.finished.all()


def test_same_seed_same_rollouts(decoder, prompts):
    sampler = DecoderSampler(decoder)
    one, two = (sampler(prompts, torch_generator(5)) for _ in range(2))
    assert torch.equal(one.token_ids, two.token_ids)
    assert not torch.equal(one.token_ids, sampler(prompts, torch_generator(6)).token_ids)


def test_draws_follow_the_distribution():
    """Frequencies by chi-square, and the same seed draws the same."""
    probs = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.5, 0.15, 0.0])
    drawn = draw(probs.expand(20_000, -1), torch_generator(0))
    counts = torch.bincount(drawn, minlength=7)
    assert (counts[probs == 0] == 0).all()
    expected = probs[probs > 0].double()
    assert chisquare(counts[probs > 0], 20_000 * expected / expected.sum()).pvalue > 0.001
    assert torch.equal(drawn, draw(probs.expand(20_000, -1), torch_generator(0)))


@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(1, 50_000),
    spread=st.floats(0.01, 30),
    total=st.floats(0.999, 1.001),
    share=st.sampled_from([0.0, 0.5, 1 - 2**-24]),
)
def test_no_draw_leaves_what_can_be_drawn(seed, vocab, spread, total, share):
    """The least and the greatest share, rounded sums, and zeros at both ends of a row."""
    probs = torch.randn(4, vocab, generator=torch_generator(seed)) * spread
    probs = F.pad(probs.softmax(-1), (1, 1)) * total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, share))
        drawn = draw(probs, torch_generator(0))
    assert (probs.gather(-1, drawn[:, None]) > 0).all()


def test_nothing_is_drawn_from_nan():
    probs = torch.tensor([[0.5, 0.5], [0.5, float("nan")]])
    with pytest.raises(NumericalError, match="not finite"):
        draw(probs, torch_generator(0))


@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_one_prompt_alone_and_prompts_that_share_nothing(make_decoder, prompts, blocks):
    """The longest and the shortest prefix there is; a single prompt's is not kept."""
    decoder = make_decoder(scale=0.3, blocks=blocks)
    sampler = DecoderSampler(decoder)
    apart = [dataclasses.replace(prompts[1], prompt=text) for text in ("One two", "A b c d")]
    for some in ([prompts[0]] * 2, apart):
        rollout = sampler(some, torch_generator(0))
        for i, ids, start, length in rows_of(rollout, decoder):
            _, final = decoder.frozen.lm.resid_and_final(ids, 2)
            torch.testing.assert_close(
                rollout.frozen_hidden[i, :length],
                final[0, start - 1 : start - 1 + length],
                atol=1e-4,
                rtol=1e-4,
            )
    assert sampler._kept_prefix.cache_info().currsize == 0


def test_temperature_is_that_of_scoring(make_decoder):
    """Frequencies of sampled first tokens follow the distribution that scores them."""
    decoder = make_decoder(scale=0.15)
    prompt = make_prompts("cloze", "train", 1, 0)[0]
    sampler = DecoderSampler(decoder, temperature=0.5, frozen_states=False)
    rollout = sampler([prompt] * 400, torch_generator(0))
    first = SparseLatents(rollout.latents.acts[:, 0], rollout.latents.indices[:, 0])

    def gap_in_spreads(temperature: float) -> float:
        """E[-log pi(a)] is the entropy when a ~ pi, so the gap is 0 up to sampling noise."""
        with torch.no_grad():
            stats = token_stats(
                decoder.hidden(first),
                rollout.token_ids[:, 0],
                decoder.frozen.lm.unembed,
                temperature=temperature,
            )
        assert float(stats.entropy.mean()) > 0.5
        return abs(float((stats.logprobs + stats.entropy).mean() / stats.logprobs.std() * 20))

    assert gap_in_spreads(0.5) < 4
    assert gap_in_spreads(1.0) > 8
    assert rollout.frozen_hidden is None


def test_every_end_of_the_model_ends_a_response(make_decoder, prompts):
    """Llama 3 and Gemma name several end tokens; each ends an answer and is no part of its text."""
    decoder = make_decoder(scale=0.05)
    lm = decoder.frozen.lm
    before = DecoderSampler(decoder)(prompts, torch_generator(0))
    row = int(before.mask.sum(-1).argmax())
    end = int(before.token_ids[row, 1])
    kept = lm.model.generation_config.eos_token_id
    try:
        lm.model.generation_config.eos_token_id = [lm.eos_token_id, end]
        after = DecoderSampler(decoder)(prompts, torch_generator(0))
    finally:
        lm.model.generation_config.eos_token_id = kept
    ended = after.token_ids == end
    assert ended[row, :2].any()
    for ids, keep, finished, hit, text in zip(
        after.token_ids, after.mask.bool(), after.finished, ended, after.completions, strict=True
    ):
        if (hit & keep).any():
            assert finished
            assert int((hit & keep).nonzero()[0]) == int(keep.sum()) - 1
            assert text == lm.tokenizer.decode(ids[keep][:-1], skip_special_tokens=True)


def test_gold_rollouts_are_the_right_answers(decoder, prompts):
    """No token is drawn; states are those of a pass over prompt and answer."""
    rollout = DecoderSampler(decoder, answers="gold")(prompts, torch_generator(0))
    again = DecoderSampler(decoder, answers="gold")(prompts, torch_generator(1))
    assert torch.equal(rollout.token_ids, again.token_ids)
    tokenizer = decoder.frozen.lm.tokenizer
    for i, ids, start, length in rows_of(rollout, decoder):
        answer = tokenizer(solution(prompts[i]) + "\n", add_special_tokens=False)["input_ids"]
        assert rollout.token_ids[i, :length].tolist() == answer[:length]
        assert length == len(answer) or answer[length - 1] in DecoderSampler(decoder).stop_ids
        assert score(prompts[i], rollout.completions[i]) == 1
        states = slice(start - 1, start - 1 + length)
        seen = decoder.features(ids).latents
        torch.testing.assert_close(
            rollout.latents.acts[i, :length], seen.acts[0, states], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_the_teachers_answers_are_drawn_from_the_frozen_model(make_decoder, prompts, blocks):
    """Seeded; with shared prefixes and without; states are those of a pass over the answer."""
    decoder = make_decoder(blocks=blocks)
    lm = decoder.frozen.lm
    sampler = DecoderSampler(decoder, temperature=0.7, answers="teacher")
    for part in (prompts, prompts[:1]):
        rollout = sampler(part, torch_generator(3))
        assert torch.equal(rollout.token_ids, sampler(part, torch_generator(3)).token_ids)
        for i, ids, start, length in rows_of(rollout, decoder):
            states = slice(start - 1, start - 1 + length)
            seen, final = lm.resid_and_final(ids, decoder.config.hook_layer)
            torch.testing.assert_close(
                rollout.frozen_hidden[i, :length], final[0, states], atol=1e-4, rtol=1e-4
            )
            latents = decoder.frozen.sae.encode(seen[:, states].float())
            torch.testing.assert_close(
                rollout.latents.acts[i, :length], latents.acts[0], atol=1e-4, rtol=1e-4
            )
    # One task, drawn again by hand from the same numbers.
    one = [prompt for prompt in prompts if prompt.task == prompts[0].task]
    rollout, generator = sampler(one, torch_generator(5)), torch_generator(5)
    logits = lm.unembed(rollout.frozen_hidden) / 0.7
    for turn in range(rollout.token_ids.shape[1]):
        drawn = draw(logits[:, turn].softmax(-1), generator)
        keep = rollout.mask[:, turn].bool()
        assert torch.equal(rollout.token_ids[keep, turn], drawn[keep])

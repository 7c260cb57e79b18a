"""Decoders with blocks in the states of a rollout: as if all had been read in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rldecoder.config.rl import PpoSettings
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.prompts import TaskPrompt, make_prompts
from rldecoder.rl import rollout as rollout_module
from rldecoder.rl.learner import PpoStep, make_learner
from rldecoder.rl.rollout import DecoderSampler, Rollout, draw
from rldecoder.rl.states import predict
from rldecoder.rl.trainer import DecoderPPOTrainer
from rldecoder.sae.selection import SparseLatents
from rldecoder.seeds import torch_generator
from tests.rl.plans import make_plan


@pytest.fixture(params=["gpt2", "llama"])
def decoder(request, make_decoder, tiny_llama_dir) -> SaeDecoderForCausalLM:
    folder = tiny_llama_dir if request.param == "llama" else None
    return make_decoder(scale=0.3, folder=folder, blocks=[2, 3])


@pytest.fixture
def prompts() -> list[TaskPrompt]:
    """Tasks in turn: two prefixes, ragged prompts, responses of different lengths."""
    pairs = zip(
        make_prompts("addition", "train", 3, 0), make_prompts("cloze", "train", 3, 0), strict=True
    )
    return [prompt for pair in pairs for prompt in pair]


def whole(
    decoder: SaeDecoderForCausalLM, rollout: Rollout, rows: list[int]
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """For each row its tokens, the latents of all of them, and where the response's states are."""
    tokenizer = decoder.frozen.lm.tokenizer
    for row in rows:
        prompt = tokenizer(rollout.prompts[row].prompt)["input_ids"]
        response = rollout.token_ids[row][rollout.mask[row].bool()]
        ids = torch.cat([torch.tensor(prompt), response])[None]
        seen = decoder.features(ids).latents
        dense = torch.zeros(*ids.shape, decoder.config.num_latents)
        dense.scatter_(-1, seen.indices, seen.acts)
        yield ids, dense, slice(len(prompt) - 1, len(prompt) - 1 + len(response))


def dense_hidden(decoder: SaeDecoderForCausalLM, dense: Tensor) -> Tensor:
    return decoder.blocks(dense @ decoder.W + decoder.b)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [1, 2, 5], [0, 4]])
def test_predictions_equal_an_unpadded_uncached_pass(decoder, prompts, rows):
    rollout = DecoderSampler(decoder)(prompts, torch_generator(0))
    with torch.no_grad():
        found = predict(decoder, rollout, torch.tensor(rows)).hidden
        expected = [
            dense_hidden(decoder, dense)[0, states]
            for _, dense, states in whole(decoder, rollout, rows)
        ]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_sampling_draws_from_what_scoring_finds(decoder, prompts, monkeypatch):
    seen: list[Tensor] = []
    monkeypatch.setattr(
        rollout_module,
        "draw",
        lambda probs, generator: seen.append(probs) or draw(probs, generator),
    )
    rollout = DecoderSampler(decoder, temperature=0.7)(prompts[::2], torch_generator(0))
    with torch.no_grad():
        hidden = predict(decoder, rollout, torch.arange(3)).hidden
    probs = (decoder.frozen.lm.unembed(hidden) / 0.7).softmax(-1)
    drawn = torch.stack(seen, dim=1)[rollout.mask.bool()]
    torch.testing.assert_close(probs, drawn, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_contributions_are_activation_times_gradient(decoder, prompts):
    rows = [0, 1, 4]
    rollout = DecoderSampler(decoder)(prompts, torch_generator(0))
    found = predict(decoder, rollout, torch.tensor(rows), slopes=True)
    assert found.slopes is not None
    assert torch.equal(found.hidden, predict(decoder, rollout, torch.tensor(rows)).hidden)
    keep = rollout.mask[rows].bool()
    latents = SparseLatents(rollout.latents.acts[rows][keep], rollout.latents.indices[rows][keep])
    used = decoder.along(latents, found.slopes)
    expected = []
    for row, (_, dense, states) in zip(rows, whole(decoder, rollout, rows), strict=True):
        chosen = rollout.token_ids[row][rollout.mask[row].bool()]
        unembedding = decoder.frozen.lm.unembedding
        directions = unembedding[chosen] - unembedding.mean(0)
        with torch.enable_grad():
            dense.requires_grad_()
            logit = (dense_hidden(decoder, dense)[0, states] * directions).sum()
            (slope,) = torch.autograd.grad(logit, dense)
        indices = rollout.latents.indices[row, : len(chosen)]
        expected.append((dense * slope)[0, states].gather(-1, indices))
    torch.testing.assert_close(used, torch.cat(expected), atol=1e-4, rtol=1e-3)


def test_contributions_of_the_linear_decoder_are_its_own(make_decoder, prompts):
    decoder = make_decoder(scale=0.3)
    rollout = DecoderSampler(decoder)(prompts, torch_generator(0))
    found = predict(decoder, rollout, torch.arange(6), slopes=True)
    keep = rollout.mask.bool()
    latents = SparseLatents(rollout.latents.acts[keep], rollout.latents.indices[keep])
    # Its part in the token's logit, less its part in the mean logit.
    every = torch.arange(decoder.frozen.lm.vocab_size)[:, None].expand(-1, len(latents.acts))
    mean = torch.stack([decoder.contributions(latents, ids) for ids in every]).mean(0)
    expected = decoder.contributions(latents, rollout.token_ids[keep]) - mean
    assert found.slopes is not None
    torch.testing.assert_close(decoder.along(latents, found.slopes), expected)


def test_ppo_trains_the_blocks_and_nothing_frozen(decoder, tmp_path):
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    frozen = {**lm.model.state_dict(), **{f"sae.{k}": v for k, v in sae.state_dict().items()}}
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    start = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    settings = PpoSettings(batch_size=6, inner_epochs=1, lr=1e-3, blocks_lr=1e-3, warmup_steps=0)
    steps: list[PpoStep] = []
    plan = make_plan(tmp_path, settings, 2, after_step=lambda step: bool(steps.append(step)))
    learner = make_learner(decoder, settings, seed=0)
    DecoderPPOTrainer(learner, plan, DecoderSampler(decoder)).train()
    for step in steps:
        assert step.metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
        assert step.metrics["clip_fraction"] == 0.0
        assert 0 < step.metrics["contribution_entropy"] <= 1
    for name, tensor in frozen.items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in decoder.state_dict().items():
        assert not torch.equal(tensor, start[name]), name
    for name, tensor in learner.reference.state_dict().items():
        assert torch.equal(tensor, start[name]), name

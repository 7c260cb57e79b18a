"""The TRL subclass: contract, parity with plain torch, resume."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from rldecoder.config.rl import PpoSettings
from rldecoder.rl import core
from rldecoder.rl.learner import Plan, PpoStep, make_learner
from rldecoder.rl.replay import ReplayBatch
from rldecoder.rl.rewards import RewardInputs
from rldecoder.rl.rollout import DecoderSampler
from rldecoder.rl.trainer import VALUE_CLIP_COEF, DecoderPPOTrainer
from rldecoder.seeds import torch_generator
from tests.rl.plans import WEIGHTS, make_plan

# --- contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (
            "_get_per_token_logps_and_entropies",
            ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
             "compute_entropy", "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images",
             "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
             "token_type_ids", "mm_token_type_ids", "image_position_ids"],
        ),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_compute_loss", ["self", "model", "inputs"]),
    ],
)  # fmt: skip
def test_private_methods_of_trl_have_the_signatures_we_override(method, parameters):
    assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters) == parameters
    assert method in vars(DecoderPPOTrainer)


# --- parity -------------------------------------------------------------------------------------


def plain_ppo(decoder, learner, settings: PpoSettings, plan: Plan, steps: int) -> list[float]:
    """PPO written down once more: plain autograd, explicit loops, no TRL."""
    sampler = DecoderSampler(decoder, temperature=settings.temperature)
    unembed, sae = decoder.frozen.lm.unembed, decoder.frozen.sae
    updates, total = 0, plan.total_steps * settings.inner_epochs
    losses = []

    def above_mean(latents, token_ids):
        """What each latent adds to the token's logit, less what it adds to the mean logit."""
        unembedding = decoder.frozen.lm.unembedding.float()
        written = latents.acts[..., None] * decoder.W[latents.indices]
        return (written @ (unembedding[token_ids] - unembedding.mean(0))[..., None])[..., 0]

    for step in range(steps):
        prompts = plan.prompts[step * settings.batch_size : (step + 1) * settings.batch_size]
        rollout = sampler(prompts, torch_generator(plan.seed, "rollout", step))
        mask = rollout.mask
        padded = rollout.latents

        def logprobs_of(hidden):
            return (unembed(hidden) / settings.temperature).log_softmax(-1)

        def chosen(full, rollout=rollout):
            return full.gather(-1, rollout.token_ids[..., None])[..., 0]

        with torch.no_grad():
            old = chosen(logprobs_of(decoder.hidden(padded)))
            frozen = logprobs_of(rollout.frozen_hidden)
            ref = chosen(logprobs_of(learner.reference.hidden(padded)))
            from rldecoder.evals.prompts import score

            scores = torch.tensor(
                [score(p, c) for p, c in zip(prompts, rollout.completions, strict=True)]
            )
            used = above_mean(padded, rollout.token_ids)
            seen = RewardInputs(
                step, old, chosen(frozen), ref, used, padded.indices, rollout.token_ids, mask,
                scores,
            )  # fmt: skip
            total_reward = sum(w * r(seen) for w, r in plan.rewards())
            sums, size = total_reward.sum(-1).tolist(), settings.responses_per_prompt
            for row, keep in enumerate(mask.sum(-1).tolist()):
                first = row // size * size
                others = [sums[i] for i in range(first, first + size) if i != row]
                if others:
                    total_reward[row, keep - 1] -= sum(others) / len(others)
            states = sae.decode(padded)
            raw = learner.critic(states)
            values = learner.normaliser.denormalise(raw)
            found = core.gae(
                total_reward, values, mask, gamma=settings.gamma, lam=settings.gae_lambda
            )
            learner.normaliser.update(found.returns, mask)
            returns = learner.normaliser.normalise(found.returns)
            advantages = core.masked_whiten(found.advantages, mask)
        for _ in range(settings.inner_epochs):
            factor = core.linear_schedule(
                updates, warmup_steps=settings.warmup_steps, total_steps=total
            )
            for group, lr in zip(
                learner.optimizer.param_groups, (settings.lr, settings.critic_lr), strict=True
            ):
                group["lr"] = lr * factor
            full = logprobs_of(decoder.hidden(padded))
            policy = core.ppo_policy_loss(
                chosen(full), old, settings.policy_coef * advantages, mask,
                clip_coef=settings.clip_coef, per_response=settings.loss_type == "grpo",
            ).loss  # fmt: skip
            entropy = core.masked_mean(core.entropy(full), mask)
            value = core.ppo_value_loss(
                learner.critic(states), raw, returns, mask, clip_coef=VALUE_CLIP_COEF
            )
            factors = [settings.response_kl_factors.get(prompt.task, 1.0) for prompt in prompts]
            exact = core.exact_kl(frozen, full)
            weighed = torch.stack([f * row for f, row in zip(factors, exact, strict=True)])
            kl = core.masked_mean(weighed, mask)
            spread = core.masked_mean(
                core.contribution_entropy(above_mean(padded, rollout.token_ids)), mask
            )
            loss = policy - settings.entropy_coef * entropy + value
            weight = settings.kl_loss_coef * WEIGHTS.faithfulness
            loss = loss + weight * kl
            loss = loss + settings.sparsity_loss_coef * WEIGHTS.monosemanticity * spread
            if plan.replay is not None:
                text = plan.replay(updates)  # other text in every update
                teacher = unembed(text.frozen_hidden).log_softmax(-1)
                student = unembed(decoder.hidden(text.latents)).log_softmax(-1)
                text_kl = core.exact_kl(teacher, student).mean()
                loss = loss + weight * text_kl
                used = above_mean(text.latents, student.detach().argmax(-1))
                spread = core.contribution_entropy(used).mean()
                loss = loss + settings.sparsity_loss_coef * WEIGHTS.monosemanticity * spread
            learner.optimizer.zero_grad()
            loss.backward()
            for part in (decoder, learner.critic):
                torch.nn.utils.clip_grad_norm_(part.parameters(), settings.max_grad_norm)
            learner.optimizer.step()
            updates += 1
            losses.append(float(loss.detach()))
    return losses


def replay_batch(decoder) -> Callable[[int], ReplayBatch]:
    def replay(update: int) -> ReplayBatch:
        resid = torch.randn(9, 64, generator=torch_generator(update, "replay"))
        target = torch.randn(9, 64, generator=torch_generator(update, "target"))
        place = torch.arange(9)
        return ReplayBatch(decoder.frozen.sae.encode(resid), target, place, place)

    return replay


@pytest.mark.parametrize(
    ("temperature", "loss_type", "policy_coef", "responses", "response_kl"),
    [
        (1.0, "bnpo", 1.0, 1, {}),
        (0.8, "grpo", 3.0, 3, {"addition": 0.3, "cloze": 2.0}),
        (1.0, "grpo", 2.0, 1, {"cloze": 0.0}),
    ],
)
def test_updates_equal_plain_torch_ppo(
    make_decoder, tmp_path, temperature, loss_type, policy_coef, responses, response_kl
):
    settings = PpoSettings(
        batch_size=6, inner_epochs=3, lr=2e-3, warmup_steps=2, temperature=temperature,
        loss_type=loss_type, policy_coef=policy_coef, responses_per_prompt=responses,
        critic_width=16, response_kl_factors=response_kl,
        entropy_coef=0.05, sparsity_loss_coef=0.5,
    )  # fmt: skip
    results = []
    for runner in ("trl", "plain"):
        decoder = make_decoder(scale=0.05)
        learner = make_learner(decoder, settings, seed=0)
        start = decoder.W.detach().clone()
        plan = make_plan(tmp_path, settings, steps=2, replay=replay_batch(decoder))
        if runner == "trl":
            DecoderPPOTrainer(
                learner, plan, DecoderSampler(decoder, temperature=temperature)
            ).train()
        else:
            plain_ppo(decoder, learner, settings, plan, steps=2)
        critic = torch.cat([p.detach().flatten() for p in learner.critic.parameters()])
        results.append((decoder.W.detach() - start, decoder.b.detach(), critic))
    moved = float(results[0][0].abs().max())
    assert moved > 1e-3
    for ours, plain in zip(*results, strict=True):
        # Adam turns rounding of a gradient near 0 into a step: compare with the distance moved.
        torch.testing.assert_close(ours, plain, atol=0.01 * moved, rtol=0)


def test_trls_loss_is_the_clipped_surrogate_minus_the_entropy_bonus(make_decoder, tmp_path):
    """Compared with core.py in the middle of training, where ratios have left 1 and are clipped."""
    decoder = make_decoder(scale=0.05)
    settings = PpoSettings(
        batch_size=6, inner_epochs=4, lr=5e-3, warmup_steps=0, entropy_coef=0.05,
        max_grad_norm=10.0,
    )  # fmt: skip
    compared: list[tuple[float, float, float]] = []

    class Spy(DecoderPPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            mask = inputs["completion_mask"]
            with torch.no_grad():
                trl = GRPOTrainer._compute_loss(self, model, inputs)
                surrogate = core.ppo_policy_loss(
                    self._now.logprobs, inputs["old_per_token_logps"], inputs["advantages"], mask,
                    clip_coef=settings.clip_coef,
                )  # fmt: skip
                bonus = settings.entropy_coef * core.masked_mean(self._now.entropy, mask)
            ours = float(surrogate.loss - bonus)
            compared.append((float(trl), ours, float(surrogate.clip_fraction)))
            return loss

    plan = make_plan(tmp_path, settings, 2)
    Spy(make_learner(decoder, settings, seed=0), plan, DecoderSampler(decoder)).train()
    assert len(compared) == 8
    assert sum(clipped > 0 for *_, clipped in compared) >= 4
    assert len({ours for _, ours, _ in compared}) == 8
    for trl, ours, _ in compared:
        assert trl == pytest.approx(ours, abs=1e-6, rel=1e-6)


# --- behaviour ----------------------------------------------------------------------------------


def test_first_inner_step_has_ratio_one_and_nothing_frozen_moves(make_decoder, tmp_path):
    decoder = make_decoder(scale=0.05)
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    frozen = {**lm.model.state_dict(), **{f"sae.{k}": v for k, v in sae.state_dict().items()}}
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    settings = PpoSettings(batch_size=6, inner_epochs=1, minibatches=1, lr=1e-3)
    steps: list[PpoStep] = []
    plan = make_plan(tmp_path, settings, 2, after_step=lambda step: bool(steps.append(step)))
    learner = make_learner(decoder, settings, seed=0)
    DecoderPPOTrainer(learner, plan, DecoderSampler(decoder)).train()
    assert [step.step for step in steps] == [0, 1]
    for step in steps:
        assert step.metrics["approx_kl"] == 0.0
        assert step.metrics["clip_fraction"] == 0.0
    for name, tensor in frozen.items():
        assert torch.equal(tensor, before[name]), name
    assert "forward" not in vars(decoder)
    assert not list((tmp_path / "trl").rglob("*"))


def test_critic_gradient_is_absent_from_the_policy(make_decoder, tmp_path):
    """With all policy losses off, the critic learns and the decoder stays bit-identical."""
    decoder = make_decoder(scale=0.05)
    settings = PpoSettings(
        batch_size=4, policy_coef=0.0, entropy_coef=0.0, kl_loss_coef=0.0, sparsity_loss_coef=0.0
    )
    learner = make_learner(decoder, settings, seed=0)
    start = decoder.W.detach().clone()
    plan = make_plan(tmp_path, settings, 2)
    DecoderPPOTrainer(learner, plan, DecoderSampler(decoder)).train()
    assert torch.equal(decoder.W, start)
    assert float(learner.critic.out_weight.detach().abs().sum()) > 0


def test_minibatches_see_every_token_once(make_decoder, tmp_path):
    decoder = make_decoder(scale=0.05)
    settings = PpoSettings(batch_size=6, minibatches=3, inner_epochs=2, lr=1e-3)
    seen: list[int] = []

    class Spy(DecoderPPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.extend(inputs["row"].tolist())
            loss = super()._compute_loss(model, inputs)
            now, old = self._now.logprobs.detach(), inputs["old_per_token_logps"]
            if len(seen) <= 2:  # before any update the two must be the same tokens
                torch.testing.assert_close(now, old, atol=1e-5, rtol=0)
                assert now.abs().sum() > 0
            return loss

    plan = make_plan(tmp_path, settings, 1)
    Spy(make_learner(decoder, settings, seed=0), plan, DecoderSampler(decoder)).train()
    assert sorted(seen) == sorted([*range(6)] * 2)


@pytest.mark.parametrize("blocks", [(), (2, 3)])
def test_inner_epochs_run_neither_the_frozen_blocks_nor_the_sae(
    make_decoder, tmp_path, monkeypatch, blocks
):
    """The rollout's latents and final hidden states serve every update of its step."""
    decoder = make_decoder(scale=0.05, blocks=blocks)
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    runs: list[str] = []
    trunk, tail, encode = lm.trunk, lm.tail, sae.encode
    for owner, name, call in ((lm, "trunk", trunk), (lm, "tail", tail), (sae, "encode", encode)):
        monkeypatch.setattr(
            owner, name, lambda *a, n=name, c=call, **kw: runs.append(n) or c(*a, **kw)
        )
    settings = PpoSettings(batch_size=4, inner_epochs=3, minibatches=2)
    sampler = DecoderSampler(decoder)
    after_sampling: list[int] = []

    def sample(prompts, generator):
        rollout = sampler(prompts, generator)
        after_sampling.append(len(runs))
        return rollout

    plan = make_plan(tmp_path, settings, 1)
    DecoderPPOTrainer(make_learner(decoder, settings, seed=0), plan, sample).train()
    assert {"trunk", "tail", "encode"} == set(runs)
    assert after_sampling == [len(runs)]


def test_resume_at_a_rollout_boundary_is_exact(make_decoder, tmp_path):
    from rldecoder.optimizer_state import pack_optimizer, unpack_optimizer

    settings = PpoSettings(batch_size=4, minibatches=2, inner_epochs=2, lr=1e-3, warmup_steps=3)
    straight = make_decoder(scale=0.05)
    learner = make_learner(straight, settings, seed=0)
    saved: dict[str, object] = {}
    asked: list[int] = []

    def replay(update: int) -> ReplayBatch:
        asked.append(update)
        return replay_batch(straight)(update)

    def save_after_two(step: PpoStep) -> bool:
        if step.step == 1:
            saved["W"], saved["b"] = straight.W.detach().clone(), straight.b.detach().clone()
            saved["critic"] = {k: v.clone() for k, v in learner.critic.state_dict().items()}
            tensors, state = pack_optimizer(learner.optimizer)
            saved["optimizer"] = {k: v.clone() for k, v in tensors.items()}, state
            saved["normaliser"] = learner.normaliser.state()
        return False

    plan = make_plan(tmp_path, settings, 4, after_step=save_after_two, replay=replay)
    DecoderPPOTrainer(learner, plan, DecoderSampler(straight)).train()
    assert asked == [*range(16)]  # 4 steps of 2 epochs of 2 minibatches, other text each time
    asked.clear()

    torch.manual_seed(12345)  # a new process has another global state
    resumed = make_decoder(scale=0.05)
    other = make_learner(resumed, settings, seed=0)
    with torch.no_grad():
        resumed.W.copy_(saved["W"])
        resumed.b.copy_(saved["b"])
    other.critic.load_state_dict(saved["critic"])
    unpack_optimizer(other.optimizer, *saved["optimizer"])
    other.normaliser.load_state(saved["normaliser"])
    plan = make_plan(tmp_path, settings, 4, replay=replay)
    DecoderPPOTrainer(other, plan, DecoderSampler(resumed), first_step=2).train()
    assert asked == [*range(8, 16)]
    assert torch.equal(resumed.W, straight.W)
    assert torch.equal(resumed.b, straight.b)
    assert torch.equal(other.critic.hidden_weight, learner.critic.hidden_weight)

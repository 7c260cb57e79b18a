"""PPO with a critic, as a subclass of TRL's GRPOTrainer (TRL itself has had no PPO since 1.13).

TRL keeps the loop, the clipped surrogate, the entropy bonus and the optimiser step. Three of its
methods are replaced: rollouts come from the decoder's own sampler with everything cached, rewards
are per token, advantages are GAE over the critic's values, and the loss gains the value loss and
the differentiable KL and sparsity losses. The methods are private, so a contract test pins their
signatures and a parity test compares whole updates with a plain torch PPO.

Resume needs nothing of TRL's: a trainer is built for the remaining PPO steps with the weights,
the optimiser and the critic of a rollout boundary, and every random number of a PPO step derives
from (seed, step). Nothing is saved by the trainer, so no pickle is ever written.
"""

from __future__ import annotations

import os
from typing import Any

# TRL pings its makers at construction; both libraries read these when they are first imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rldecoder.decoder.distill import LogitBuffers, matmul_precision
from rldecoder.evals.prompts import score
from rldecoder.rl import core
from rldecoder.rl.learner import Learner, Plan, PolicyNow, PpoStep, StepData
from rldecoder.rl.policy import TokenStats, reverse_kl, token_stats
from rldecoder.rl.replay import text_losses
from rldecoder.rl.rewards import RewardInputs, at_last_token, compose
from rldecoder.rl.rollout import Rollout, Sampler
from rldecoder.rl.states import predict
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import derive_seed, torch_generator

VALUE_CLIP_COEF = 0.2
"""Half-width, in normalised returns, of what the critic may move by in a step."""


class DecoderPPOTrainer(GRPOTrainer):
    """PPO on a feature decoder.

    Args:
        learner: what is trained.
        plan: the rest.
        sampler: makes rollouts.
        first_step: PPO steps that an earlier, interrupted run has done.
    """

    def __init__(
        self, learner: Learner, plan: Plan, sampler: Sampler, *, first_step: int = 0
    ) -> None:
        self.learner, self.plan, self.sampler = learner, plan, sampler
        self.ppo_step = first_step - 1
        self._step_data: StepData | None = None
        self._now: PolicyNow | None = None

        settings = plan.settings
        updates = settings.inner_epochs * settings.minibatches
        self._first_update = first_step * updates
        self._buffers = LogitBuffers.kept(learner.decoder.frozen.lm.vocab_size)
        remaining = plan.prompts[first_step * settings.batch_size :]
        rows = [{"prompt": prompt.prompt, "row": row} for row, prompt in enumerate(remaining)]
        self._remaining = remaining

        # A reloaded optimiser brings the rates of its last step; the schedule starts from peaks.
        for group in learner.optimizer.param_groups:
            group["lr"] = group["peak"]
        schedule = LambdaLR(
            learner.optimizer,
            lambda done: core.linear_schedule(
                done + self._first_update,
                warmup_steps=settings.warmup_steps,
                total_steps=plan.total_steps * updates,
            ),
        )

        super().__init__(
            model=learner.decoder,
            reward_funcs=[_task_score],
            args=_trl_config(plan, len(rows) // settings.batch_size, learner.decoder.device),
            train_dataset=Dataset.from_list(rows),
            processing_class=learner.decoder.frozen.lm.tokenizer,
            optimizers=(learner.optimizer, schedule),
            callbacks=[_RolloutBoundary(self)],
        )
        # TRL replaces `forward` on the instance by one with a fused output layer that this
        # decoder (its unembedding is the frozen model's) cannot use.
        self.model.__dict__.pop("forward", None)
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """Never."""

    def _generate_and_score_completions(
        self, inputs: list[dict[str, Tensor | Any]]
    ) -> dict[str, Tensor | Any]:
        """One PPO step's rollouts, rewards, values, advantages and returns."""
        self.ppo_step += 1
        seed, step = self.plan.seed, self.ppo_step
        # TRL shuffles with the global generator: tie it to the step, so that resume is exact.
        torch.manual_seed(derive_seed(seed, "shuffle", step))

        prompts = [self._remaining[int(row["row"])] for row in inputs]
        # Which latents are active must not depend on the precision that scoring runs in.
        with matmul_precision("highest"):
            rollout = self.sampler(prompts, torch_generator(seed, "rollout", step))
        self._step_data = data = self._prepare(rollout)

        mask = rollout.mask
        return {
            "row": torch.arange(len(mask), device=mask.device),
            "prompt_ids": rollout.token_ids[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": rollout.token_ids,
            "completion_mask": mask,
            "advantages": data.advantages,
            "old_per_token_logps": data.seen.logprobs,
            "old_values": data.values,
            "returns": data.returns,
        }

    @torch.no_grad()
    def _prepare(self, rollout: Rollout) -> StepData:
        """Score the rollouts by policy, frozen model, reference and critic, once a PPO step."""
        settings, learner, decoder = self.plan.settings, self.learner, self.learner.decoder
        lm, mask, keep = decoder.frozen.lm, rollout.mask, rollout.mask.bool()
        token_ids = rollout.token_ids[keep]
        latents = SparseLatents(rollout.latents.acts[keep], rollout.latents.indices[keep])
        everything = torch.arange(len(mask), device=mask.device)

        def stats(hidden: Tensor) -> TokenStats:
            return token_stats(hidden, token_ids, lm.unembed, temperature=settings.temperature)

        # The frozen model, in place: these are the largest tensors of the step.
        frozen = None
        frozen_logprobs = torch.zeros_like(mask, dtype=torch.float32)
        if rollout.frozen_hidden is not None:
            frozen = lm.unembed(rollout.frozen_hidden[keep]) / settings.temperature
            frozen.sub_(frozen.logsumexp(-1, keepdim=True))
            frozen_logprobs = _unflatten(frozen.gather(-1, token_ids[:, None])[:, 0], mask)

        # The policy that sampled, and the decoder that it started from.
        predicted = predict(decoder, rollout, everything, slopes=True)
        assert predicted.slopes is not None
        old = stats(predicted.hidden)
        reference = stats(predict(learner.reference, rollout, everything).hidden)

        pairs = zip(rollout.prompts, rollout.completions, strict=True)
        seen = RewardInputs(
            step=self.ppo_step,
            logprobs=_unflatten(old.logprobs, mask),
            frozen_logprobs=frozen_logprobs,
            ref_logprobs=_unflatten(reference.logprobs, mask),
            contributions=_unflatten(decoder.along(latents, predicted.slopes), mask),
            latents=rollout.latents.indices,
            token_ids=rollout.token_ids,
            mask=mask,
            task_scores=frozen_logprobs.new_tensor([score(*pair) for pair in pairs]),
        )
        rewards = compose(self.plan.rewards(), seen)

        # Advantages above what the prompt's other responses got, if it has several.
        states = decoder.frozen.sae.decode(latents)
        raw = _unflatten(learner.critic(states), mask)
        values = learner.normaliser.denormalise(raw)
        baseline = core.mean_of_others(rewards.total.sum(-1), settings.responses_per_prompt)
        advantages, returns = core.gae(
            rewards.total - at_last_token(baseline, mask),
            values,
            mask,
            gamma=settings.gamma,
            lam=settings.gae_lambda,
        )
        learner.normaliser.update(returns, mask)

        factors = [settings.response_kl_factors.get(prompt.task, 1.0) for prompt in rollout.prompts]
        row, counts = keep.nonzero()[:, 0], None
        if self.plan.response_loss == "right":
            counts = (seen.task_scores >= 1)[row]
        return StepData(
            rollout=rollout,
            seen=seen,
            rewards=rewards,
            advantages=settings.policy_coef * core.masked_whiten(advantages, mask),
            values=raw,
            returns=learner.normaliser.normalise(returns),
            row=row,
            token_ids=token_ids,
            latents=latents,
            states=states,
            slopes=predicted.slopes,
            frozen_logprobs=frozen,
            kl_factors=torch.tensor(factors, device=mask.device),
            counts=counts,
            entropy=float(old.entropy.mean()),
            value_explained_variance=core.explained_variance(values, returns, mask),
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies [b, T], which `_compute_loss` has just computed."""
        assert self._now is not None
        return self._now.logprobs, self._now.entropy, None

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """One update: TRL's clipped surrogate and entropy bonus, plus the value, KL and sparsity
        losses. [b, T] tensors have their rows in the order in which TRL has shuffled them."""
        data, learner, settings = self._step_data, self.learner, self.plan.settings
        assert data is not None
        weights, mask = self.plan.loss_weights(), inputs["completion_mask"]
        kl_coef = settings.kl_loss_coef * weights.faithfulness
        sparsity_coef = settings.sparsity_loss_coef * weights.monosemanticity

        # This minibatch's tokens among those of the step, which are kept flat, row after row.
        rows, order = inputs["row"].sort()
        here = torch.isin(data.row, rows)

        def shuffled(flat: Tensor) -> Tensor:
            return _unflatten(flat, mask[order])[order.argsort()]

        # The policy as it is now, from the latents of the rollout: neither trunk nor SAE runs.
        frozen = data.frozen_logprobs
        if frozen is not None and len(rows) < len(data.rollout.mask):
            frozen = frozen[here]  # a copy of [n, V], which the whole batch can do without
        hidden = predict(learner.decoder, data.rollout, rows).hidden
        now = token_stats(
            hidden,
            data.token_ids[here],
            learner.decoder.frozen.lm.unembed,
            temperature=settings.temperature,
            frozen_logprobs=frozen,
        )
        self._now = PolicyNow(shuffled(now.logprobs), shuffled(now.entropy))
        policy_loss = super()._compute_loss(model, inputs)

        loss = value_loss = core.ppo_value_loss(
            shuffled(learner.critic(data.states[here])),
            inputs["old_values"],
            inputs["returns"],
            mask,
            clip_coef=VALUE_CLIP_COEF,
        )
        metrics = {"value_loss": value_loss}

        # What can be differentiated is a loss and no reward: faithfulness on own responses...
        if kl_coef > 0 and (distance := self._distance(now, hidden, frozen)) is not None:
            factors = data.kl_factors[data.row[here]]
            loss = loss + kl_coef * _mean(factors * distance, data.counts, here)
            name = "gold_ce" if self.plan.response_loss in ("gold", "right") else "rollout_kl"
            metrics[name] = _mean(distance, data.counts, here)

        # ... few latents carrying each choice ...
        if sparsity_coef > 0:
            active = SparseLatents(data.latents.acts[here], data.latents.indices[here])
            contributions = learner.decoder.along(active, data.slopes[here])
            entropy = _mean(core.contribution_entropy(contributions), data.counts, here)
            loss = loss + sparsity_coef * entropy
            metrics["contribution_entropy"] = entropy

        # ... and both on text, so that what supervised training taught is kept.
        if self.plan.replay is not None and max(kl_coef, sparsity_coef) > 0:
            with matmul_precision("highest"):  # as with rollouts: it must not choose the latents
                text = self.plan.replay(self._first_update + self.state.global_step)
            text_kl, text_entropy = text_losses(
                learner.decoder, text, self._buffers, entropy=sparsity_coef > 0
            )
            loss = loss + kl_coef * text_kl
            metrics["text_kl"] = text_kl
            if text_entropy is not None:
                loss = loss + sparsity_coef * text_entropy
                metrics["text_entropy"] = text_entropy

        # `finish_step` averages these over the step; rows sorted, so that no shuffling shows.
        surrogate = core.ppo_policy_loss(
            self._now.logprobs.detach()[order],
            inputs["old_per_token_logps"][order],
            inputs["advantages"][order],
            mask[order],
            clip_coef=settings.clip_coef,
            per_response=settings.loss_type == "grpo",
        )
        metrics |= {
            "policy_loss": surrogate.loss,
            "clip_fraction": surrogate.clip_fraction,
            "approx_kl": surrogate.approx_kl,
        }
        for name, value in metrics.items():
            self._metrics["train"][f"ppo/{name}"].append(float(value.detach()))
        return policy_loss + loss / self.current_gradient_accumulation_steps

    def _distance(self, now: TokenStats, hidden: Tensor, frozen: Tensor | None) -> Tensor | None:
        """What the loss on responses wants small at each of the minibatch's tokens, in nats."""
        if self.plan.response_loss in ("gold", "right"):
            return -now.logprobs
        if frozen is None or self.plan.response_loss == "forward_kl":
            return None if frozen is None else now.kl
        unembed = self.learner.decoder.frozen.lm.unembed
        return reverse_kl(hidden, unembed, frozen, temperature=self.plan.settings.temperature)

    def finish_step(self) -> PpoStep:
        """The finished PPO step; called at the rollout boundary."""
        data = self._step_data
        assert data is not None
        rollout, mask = data.rollout, data.rollout.mask
        means = {
            name.removeprefix("ppo/"): sum(values) / len(values)
            for name, values in self._metrics["train"].items()
            if name.startswith("ppo/")
        }
        self._metrics["train"].clear()

        effective = core.effective_latents(data.seen.contributions)
        means |= {
            "reward": float(data.rewards.total.sum(-1).mean()),
            "task_score": float(data.seen.task_scores.mean()),
            "entropy": data.entropy,
            "effective_latents": float(core.masked_mean(effective, mask)),
            "response_tokens": float(mask.sum(-1).float().mean()),
            "truncated_fraction": float((~rollout.finished).float().mean()),
            "value_explained_variance": data.value_explained_variance,
            "lr": float(self.learner.optimizer.param_groups[0]["lr"]),
        }
        means |= {f"reward_{name}": float(v.mean()) for name, v in data.rewards.parts.items()}
        return PpoStep(self.ppo_step, rollout, data.rewards, data.seen.task_scores, means)


class _RolloutBoundary(TrainerCallback):
    """Clips and clears the critic's gradients, and reports at the end of each PPO step."""

    def __init__(self, trainer: DecoderPPOTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # HF clips and clears only what belongs to the model.
        torch.nn.utils.clip_grad_norm_(
            self.trainer.learner.critic.parameters(), self.trainer.plan.settings.max_grad_norm
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.learner.critic.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        settings = self.trainer.plan.settings
        updates = settings.inner_epochs * settings.minibatches
        if state.global_step % updates == 0:
            stop = self.trainer.plan.after_step(self.trainer.finish_step())
            control.should_training_stop |= stop
        return control


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[N, ...] in row order to [B, T, ...], 0 on padding; differentiable."""
    out = flat.new_zeros(*mask.shape, *flat.shape[1:])
    return out.masked_scatter(
        mask.bool().view(*mask.shape, *([1] * (flat.dim() - 1))).expand_as(out), flat
    )


def _mean(values: Tensor, counts: Tensor | None, here: Tensor) -> Tensor:
    """Mean of [n] over those tokens of a minibatch (`here` [N]) that count; 0 where none does."""
    return values.mean() if counts is None else core.masked_mean(values, counts[here])


def _task_score(completions: list[str], **kwargs: Any) -> list[float | None]:
    """TRL wants a reward function; what would call it is replaced."""
    return [0.0] * len(completions)


def _trl_config(plan: Plan, num_steps: int, device: torch.device) -> GRPOConfig:
    settings = plan.settings
    # PPO of ours: no KL to a reference in TRL's loss, advantages as they are, no files.
    config = GRPOConfig(
        output_dir=str(plan.output_dir),
        per_device_train_batch_size=settings.batch_size // settings.minibatches,
        steps_per_generation=settings.minibatches,
        num_generations=settings.batch_size,
        num_iterations=settings.inner_epochs,
        max_steps=num_steps * settings.inner_epochs * settings.minibatches,
        gradient_accumulation_steps=1,
        max_grad_norm=settings.max_grad_norm,
        learning_rate=settings.lr,
        beta=0.0,
        loss_type=settings.loss_type,
        scale_rewards="none",
        epsilon=settings.clip_coef,
        entropy_coef=settings.entropy_coef,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        disable_dropout=True,
        shuffle_dataset=False,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=derive_seed(plan.seed, "trl"),
    )

    # TRL refuses fewer than 2 generations a prompt, which PPO with a critic does not need.
    config.num_generations = 1
    return config

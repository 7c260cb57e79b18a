"""PPO with a critic, as a subclass of TRL's GRPOTrainer (TRL itself has had no PPO since 1.13).

TRL keeps the loop, the clipped surrogate, the entropy bonus and the optimiser step. Four of its
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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from rldecoder.evals.prompts import TaskPrompt, score
from rldecoder.rl import core
from rldecoder.rl.learner import Learner, Plan, PpoStep
from rldecoder.rl.policy import TokenStats, token_stats
from rldecoder.rl.replay import text_losses
from rldecoder.rl.rewards import RewardInputs, at_last_token, compose
from rldecoder.rl.rollout import Rollout, Sampler
from rldecoder.rl.states import predict
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import derive_seed, torch_generator


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
            self.rollout = self.sampler(prompts, torch_generator(seed, "rollout", step))
        return self._prepare_rollout(prompts)

    @torch.no_grad()
    def _prepare_rollout(self, prompts: list[TaskPrompt]) -> dict[str, Tensor]:
        rollout, learner, settings = self.rollout, self.learner, self.plan.settings
        decoder, mask = learner.decoder, self.rollout.mask
        factors = settings.response_kl_factors
        self._kl_factors = torch.tensor(
            [factors.get(prompt.task, 1.0) for prompt in prompts], device=mask.device
        )
        self._flat = _flatten(rollout)
        flat = self._flat
        unembed = decoder.frozen.lm.unembed
        self._frozen = None
        frozen_logprobs = torch.zeros_like(mask, dtype=torch.float32)
        if rollout.frozen_hidden is not None:
            logits = unembed(rollout.frozen_hidden[mask.bool()]) / settings.temperature
            self._frozen = logits.sub_(logits.logsumexp(-1, keepdim=True))
            chosen = self._frozen.gather(-1, flat.token_ids[:, None])[:, 0]
            frozen_logprobs = _unflatten(chosen, mask)
        everything = torch.arange(len(mask), device=mask.device)
        found = predict(decoder, rollout, everything, slopes=True)
        assert found.slopes is not None
        self._slopes = found.slopes
        self._old = self._stats(everything, found.hidden)
        used = decoder.along(flat.latents, self._slopes)
        reference = token_stats(
            predict(learner.reference, rollout, everything).hidden,
            flat.token_ids,
            unembed,
            temperature=settings.temperature,
        )
        self._states = decoder.frozen.sae.decode(flat.latents)
        self._seen = RewardInputs(
            step=self.ppo_step,
            logprobs=_unflatten(self._old.logprobs, mask),
            frozen_logprobs=frozen_logprobs,
            ref_logprobs=_unflatten(reference.logprobs, mask),
            contributions=_unflatten(used, mask),
            latents=rollout.latents.indices,
            token_ids=rollout.token_ids,
            mask=mask,
            task_scores=torch.zeros(len(mask), device=mask.device),
        )
        ids = [row[keep.bool()].tolist() for row, keep in zip(rollout.token_ids, mask, strict=True)]
        texts = [prompt.prompt for prompt in prompts]
        self._calculate_rewards([], texts, rollout.completions, ids)
        return self._advantages()

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[str],
        completions: list[str],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """The composite reward; returns the unweighted parts [B, parts] in TRL's form."""
        scores = [
            score(prompt, text)
            for prompt, text in zip(self.rollout.prompts, completions, strict=True)
        ]
        self._seen = self._seen._replace(task_scores=self._seen.task_scores.new_tensor(scores))
        self.rewards = compose(self.plan.rewards(), self._seen)
        return torch.stack(list(self.rewards.parts.values()), dim=1)

    def _advantages(self) -> dict[str, Tensor]:
        learner, settings, mask = self.learner, self.plan.settings, self.rollout.mask
        raw = _unflatten(learner.critic(self._states), mask)
        values = learner.normaliser.denormalise(raw)
        rewards = self.rewards.total
        baseline = core.mean_of_others(rewards.sum(-1), settings.responses_per_prompt)
        rewards = rewards - at_last_token(baseline, mask)
        advantages, returns = core.gae(
            rewards, values, mask, gamma=settings.gamma, lam=settings.gae_lambda
        )
        learner.normaliser.update(returns, mask)
        self._value_fit = core.explained_variance(values, returns, mask)
        whitened = settings.policy_coef * core.masked_whiten(advantages, mask)
        rows = torch.arange(len(mask), device=mask.device)
        return {
            "row": rows,
            "prompt_ids": self.rollout.token_ids[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": self.rollout.token_ids,
            "completion_mask": mask,
            "advantages": whitened,
            "old_per_token_logps": self._seen.logprobs,
            "old_values": raw,
            "returns": learner.normaliser.normalise(returns),
        }

    def _stats(self, rows: Tensor, hidden: Tensor) -> TokenStats:
        """Policy statistics of the response tokens of some (ascending) rows, flat."""
        flat = self._flat
        here = torch.isin(flat.row, rows.to(flat.row.device))
        everything = bool(here.all())
        pick: Callable[[Tensor], Tensor] = (lambda x: x) if everything else (lambda x: x[here])
        return token_stats(
            hidden,
            pick(flat.token_ids),
            self.learner.decoder.frozen.lm.unembed,
            temperature=self.plan.settings.temperature,
            frozen_logprobs=None if self._frozen is None else pick(self._frozen),
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
        """Log-probabilities and entropies [b, T] of the minibatch, from the cached latents."""
        rows = self._rows
        order = rows.argsort()
        mask = self.rollout.mask[rows[order]]
        hidden = predict(self.learner.decoder, self.rollout, rows[order]).hidden
        self._now = self._stats(rows[order], hidden)
        back = order.argsort()
        logps = _unflatten(self._now.logprobs, mask)[back]
        return logps, _unflatten(self._now.entropy, mask)[back], None

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """TRL's clipped surrogate and entropy bonus, plus the value, KL and sparsity losses."""
        settings, learner = self.plan.settings, self.learner
        self._rows = inputs["row"]
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        here = torch.isin(self._flat.row, self._rows)
        ascending = self._rows.argsort().argsort()
        raw = _unflatten(
            learner.critic(self._states[here]), self.rollout.mask[self._rows.sort()[0]]
        )
        value_loss = core.ppo_value_loss(
            raw[ascending],
            inputs["old_values"],
            inputs["returns"],
            mask,
            clip_coef=settings.value_clip_coef,
        )
        weights = self.plan.loss_weights()
        extra, metrics = value_loss, {"value_loss": value_loss}
        kl_coef = settings.kl_loss_coef * weights.faithfulness
        if kl_coef > 0 and self._frozen is not None:
            factors = self._kl_factors[self._flat.row[here]]
            extra = extra + kl_coef * (factors * self._now.kl).mean()
            metrics["rollout_kl"] = self._now.kl.mean()
        sparsity_coef = settings.sparsity_loss_coef * weights.monosemanticity
        if sparsity_coef > 0:
            spread = self._contribution_entropy(here)
            extra, metrics["contribution_entropy"] = extra + sparsity_coef * spread, spread
        if self.plan.replay is not None and max(kl_coef, sparsity_coef) > 0:
            with matmul_precision("highest"):  # as with rollouts: it must not choose the latents
                text = self.plan.replay(self._first_update + self.state.global_step)
            text_kl, text_spread = text_losses(
                learner.decoder, text, self._buffers, entropy=sparsity_coef > 0
            )
            extra, metrics["text_kl"] = extra + kl_coef * text_kl, text_kl
            if text_spread is not None:
                extra = extra + sparsity_coef * text_spread
                metrics["text_entropy"] = text_spread
        self._watch(inputs, metrics)
        return loss + extra / self.current_gradient_accumulation_steps

    def _contribution_entropy(self, here: Tensor) -> Tensor:
        latents = self._flat.latents
        chosen = SparseLatents(latents.acts[here], latents.indices[here])
        used = self.learner.decoder.along(chosen, self._slopes[here])
        return core.contribution_entropy(used).mean()

    def _watch(self, inputs: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        """Collect the metrics of one inner step; `finish_step` averages them."""
        order = self._rows.argsort()
        mask, settings = inputs["completion_mask"][order], self.plan.settings
        watched = core.ppo_policy_loss(
            _unflatten(self._now.logprobs.detach(), mask),
            inputs["old_per_token_logps"][order],
            inputs["advantages"][order],
            mask,
            clip_coef=settings.clip_coef,
            per_response=settings.loss_type == "grpo",
        )
        found = {
            **metrics,
            "policy_loss": watched.loss,
            "clip_fraction": watched.clip_fraction,
            "approx_kl": watched.approx_kl,
        }
        for name, value in found.items():
            self._metrics["train"][f"ppo/{name}"].append(float(value.detach()))

    def finish_step(self) -> PpoStep:
        """The finished PPO step; called at the rollout boundary."""
        mask, old = self.rollout.mask, self._old
        found = {
            name.removeprefix("ppo/"): sum(values) / len(values)
            for name, values in self._metrics["train"].items()
            if name.startswith("ppo/")
        }
        self._metrics["train"].clear()
        effective = core.effective_latents(self._seen.contributions)
        found |= {
            "reward": float(self.rewards.total.sum(-1).mean()),
            "task_score": float(self._seen.task_scores.mean()),
            "entropy": float(old.entropy.mean()),
            "effective_latents": float(core.masked_mean(effective, mask)),
            "response_tokens": float(mask.sum(-1).float().mean()),
            "truncated_fraction": float((~self.rollout.finished).float().mean()),
            "value_explained_variance": self._value_fit,
            "lr": float(self.learner.optimizer.param_groups[0]["lr"]),
        }
        found |= {f"reward_{name}": float(v.mean()) for name, v in self.rewards.parts.items()}
        return PpoStep(self.ppo_step, self.rollout, self.rewards, self._seen.task_scores, found)


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


class _Flat(NamedTuple):
    """The response tokens of a batch in row order, padding left out."""

    row: Tensor
    """[N] the rollout each token belongs to."""
    token_ids: Tensor
    """[N]"""
    latents: SparseLatents
    """[N, K]"""


def _flatten(rollout: Rollout) -> _Flat:
    keep = rollout.mask.bool()
    latents = SparseLatents(rollout.latents.acts[keep], rollout.latents.indices[keep])
    return _Flat(keep.nonzero()[:, 0], rollout.token_ids[keep], latents)


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[N, ...] in row order to [B, T, ...], 0 on padding; differentiable."""
    out = flat.new_zeros(*mask.shape, *flat.shape[1:])
    return out.masked_scatter(
        mask.bool().view(*mask.shape, *([1] * (flat.dim() - 1))).expand_as(out), flat
    )


def _task_score(completions: list[str], **kwargs: Any) -> list[float | None]:
    """TRL wants a reward function; `_calculate_rewards` is overridden and never calls it."""
    return [0.0] * len(completions)


def _trl_config(plan: Plan, num_steps: int, device: torch.device) -> GRPOConfig:
    settings = plan.settings
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

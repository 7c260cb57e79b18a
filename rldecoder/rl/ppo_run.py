"""A whole PPO training: stages of reward weights, evaluations, checkpoints, early stop.

The trained decoder and the trained controls are the same run with other rewards and losses,
so that a control differs in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rldecoder.checkpoints import Checkpoints
from rldecoder.config.rl import TrainPpoConfig
from rldecoder.curves import Curves
from rldecoder.data.activation_reader import ActivationReader, ShuffledActivations
from rldecoder.decoder.distill import matmul_precision
from rldecoder.decoder.loading import save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import NumericalError
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.evals.suite import TaskSuite, check_lengths
from rldecoder.files import remove
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.optimizer_state import pack_optimizer, unpack_optimizer
from rldecoder.reporting import Reporter
from rldecoder.rl import core
from rldecoder.rl.collapse import CollapseState, CollapseWatch
from rldecoder.rl.evaluation import EVALUATIONS, EvaluationRow, Evaluator
from rldecoder.rl.kinds import ANSWERS, RESPONSE_LOSSES, Kind, asks_the_teacher, settings_of
from rldecoder.rl.learner import Plan, PpoStep, choose_share, make_learner
from rldecoder.rl.replay import Replay
from rldecoder.rl.rewards import FaithfulnessReward, RandomReward, WeightedReward, decoder_rewards
from rldecoder.rl.rollout import DecoderSampler
from rldecoder.rl.rollout_log import RolloutLog, rollout_rows
from rldecoder.rl.text_training import require_text, train_on_text
from rldecoder.schemas import JsonRecord, write_parquet
from rldecoder.seeds import derive_seed


class PolicyTraining(JsonRecord):
    """What is known of the published trainings."""

    seeds: tuple[int, ...]
    """One a training, in their order; controls are trained with the same."""


class PpoRun:
    """One PPO training that can be killed at any time and goes on where it was.

    Args:
        name: for live metrics and alerts.
        kind: what drives the training.
        config: of train_ppo (the controls use the same).
        decoder: attached, the supervised one; trained in place, and a copy is the reference.
        activations: folder of the activation cache.
        progress: folder for checkpoints.
        owner: whose they are; another's are not taken up.
        seed: everything random derives from it and the PPO step.
        text: what is replayed; None: the cache's training split.
        report: where live metrics and alerts go.
        advance: called after each PPO step with a short note (the progress bar).
        checkpoint_every_steps: PPO steps.
    """

    def __init__(
        self,
        *,
        name: str,
        kind: Kind,
        config: TrainPpoConfig,
        decoder: SaeDecoderForCausalLM,
        activations: Path,
        progress: Path,
        seed: int,
        report: Reporter,
        checkpoint_every_steps: int,
        text: ShuffledActivations | None = None,
        owner: str = "",
    ) -> None:
        self.name, self.kind, self.config, self.seed = name, kind, config, seed
        self.decoder, self.progress, self.report = decoder, progress, report
        self.checkpoint_every_steps = checkpoint_every_steps
        self.settings = settings_of(config.ppo, kind)
        self.learner = make_learner(decoder, self.settings, seed)
        self.total_steps = sum(stage.steps for stage in config.stages)
        self.activations, self.text = activations, text
        self.checkpoints = Checkpoints(progress / "checkpoints", owner=owner, note=report.note)
        self.curves = Curves()
        self.evaluations: list[EvaluationRow] = []
        self.watch = CollapseWatch(config.collapse)
        self.scale = core.RewardWeights(1.0, 1.0, 1.0)
        self.healthy = self._weights_now()
        self.done = 0
        self.stopped: str | None = None
        self.rollouts = RolloutLog(progress / "rollouts", self._resume())
        self.suite = TaskSuite(config.tasks, config.file_tasks, decoder.frozen.lm)
        self.evaluator = self._evaluator() if kind == "trained" else None

    @property
    def stage(self) -> int:
        """The stage, from 1, that PPO step `done` (the next or present one) belongs to."""
        return self._stage_of(self.done)

    def weights(self) -> core.RewardWeights:
        """The present stage's weights, shifted by the adaptive rule."""
        base = self.config.stages[self.stage - 1]
        return core.RewardWeights(
            base.faithfulness * self.scale.faithfulness,
            base.monosemanticity * self.scale.monosemanticity,
            base.task * self.scale.task,
        )

    def train(self, advance: Callable[[str], None]) -> None:
        """Train to the end, or until the watch stops it; then the decoder holds the result."""
        if self.done == 0 and self.evaluator is not None and not self.evaluations:
            self._evaluate(stage=0)

        if self.done < self.total_steps and self.stopped is None:
            with quiet_transformers(), matmul_precision(self.settings.matmul_precision):
                if self.kind == "text_only":
                    self._train_on_text(advance)
                else:
                    self._train_on_responses(advance)

        # A run that collapsed publishes its last weights in order, for stages that it missed too.
        self.decoder.requires_grad_(False).eval()
        if self.stopped is not None:
            self._restore_healthy()
            for stage in range(self._stage_of(self.done - 1), len(self.config.stages) + 1):
                self._keep_decoder(stage)

    def _train_on_responses(self, advance: Callable[[str], None]) -> None:
        sampler = DecoderSampler(
            self.decoder,
            temperature=self.settings.temperature,
            frozen_states=asks_the_teacher(self.kind, self.settings, self.suite.names),
            answers=ANSWERS.get(self.kind, "own"),
        )
        plan = Plan(
            settings=self.settings,
            prompts=self._prompts(),
            total_steps=self.total_steps,
            rewards=self._rewards,
            loss_weights=self.weights,
            replay=self._replay(),
            after_step=lambda step: self._after_step(step, advance),
            seed=self.seed,
            output_dir=self.progress / "trl",
            response_loss=RESPONSE_LOSSES.get(self.kind, "forward_kl"),
        )
        # Importing TRL takes seconds, which only stages that train should pay for.
        from rldecoder.rl.trainer import DecoderPPOTrainer

        DecoderPPOTrainer(self.learner, plan, sampler, first_step=self.done).train()

    def _train_on_text(self, advance: Callable[[str], None]) -> None:
        require_text(self.settings)
        replay = self._replay()
        assert replay is not None

        def after_step(step: int, metrics: dict[str, float]) -> bool:
            return self._finish(step, metrics, lambda: advance(f"KL {metrics['text_kl']:.3f}"))

        train_on_text(
            self.learner,
            self.settings,
            replay,
            total_steps=self.total_steps,
            first_step=self.done,
            faithfulness=lambda: self.weights().faithfulness,
            after_step=after_step,
        )

    def publish(self, evaluations: Path, rollouts: Path) -> None:
        """Write both tables."""
        columns = zip(*self.evaluations, strict=True)
        write_parquet(
            evaluations, dict(zip(EvaluationRow._fields, columns, strict=True)), EVALUATIONS
        )
        self.rollouts.publish(rollouts)

    def stage_decoder(self, stage: int) -> Path:
        """Where the decoder at the end of a stage (from 1) lies, in the progress folder: the
        weights as they were, before any share of the way was chosen."""
        return self.progress / f"stage{stage}"

    def _keep_decoder(self, stage: int) -> None:
        aside = self.progress / "writing"
        remove(aside)
        save_decoder(self.decoder, aside)
        remove(self.stage_decoder(stage))
        aside.rename(self.stage_decoder(stage))

    def _kept_decoders(self) -> list[Path]:
        """Decoders of stages that are over: a resumed run publishes them as they are."""
        stages = range(1, len(self.config.stages) + 1)
        return [folder for stage in stages if (folder := self.stage_decoder(stage)).is_dir()]

    def _after_step(self, step: PpoStep, advance: Callable[[str], None]) -> bool:
        """Keep, judge and save what a PPO step did; whether training ends here."""
        self.rollouts.add(rollout_rows(step, self._stage_of(step.step)))
        reward, task = step.metrics["reward"], step.metrics["task_score"]
        return self._finish(
            step.step, step.metrics, lambda: advance(f"reward {reward:.3f} task {task:.2f}")
        )

    def _finish(self, step: int, seen: Mapping[str, float], advance: Callable[[], None]) -> bool:
        """Step number `step` (from 0) is over; whether training ends here."""
        weights = {f"weight_{name}": value for name, value in self.weights()._asdict().items()}
        metrics = {**seen, **weights}
        if bad := sorted(name for name, value in metrics.items() if not math.isfinite(value)):
            raise NumericalError(
                f"PPO step {step} of {self.name} gave NaN or infinity in {', '.join(bad)}.",
                "Training diverged.",
                "Lower train_ppo.ppo.lr; the last checkpoint is kept.",
            )

        stage = self._stage_of(step)
        self.done = step + 1
        self.curves.log(self.done, **metrics)
        self.report.metrics(self.name, self.done, metrics)
        if self.kind == "trained":  # a control runs to its end whatever becomes of it
            warning = self.watch.warning(step, metrics)
            if warning is not None:
                self.report.alert(f"{self.name}: {warning}")
            self._stop_if(self.watch.after_step(metrics))

        # The end of a stage is kept as it was, before a share of the way is chosen; what is
        # evaluated last is what is published.
        ends_stage = self.done == self.total_steps or self._stage_of(self.done) != stage
        if ends_stage and self.kind == "trained":
            self._keep_decoder(stage)
        if self.done == self.total_steps and self.stopped is None:
            self._choose_share()
        if self.evaluator is not None and (
            ends_stage or self.done % self.config.eval_every_steps == 0
        ):
            self._evaluate(stage, effective_latents=metrics["effective_latents"])

        if (
            self.done == self.total_steps
            or self.stopped
            or self.done % self.checkpoint_every_steps == 0
        ):
            self._save()
        advance()
        return self.stopped is not None

    def _evaluator(self) -> Evaluator:
        return Evaluator(
            self.decoder.frozen.lm,
            self.activations,
            split="validation",
            suite=self.suite,
            num_prompts=self.config.eval_prompts,
            num_tokens=self.config.eval_tokens,
            seed=derive_seed(self.seed, "evaluation"),
        )

    def _choose_share(self) -> None:
        """Go back towards the supervised decoder as far as the settings say (`interpolation`)."""
        judge, settings = self.evaluator or self._evaluator(), self.settings
        share = choose_share(
            self.learner, settings.interpolation, settings.interpolation_max_kl, judge.kl
        )
        self.curves.log(self.done, interpolation=share)

    def _evaluate(self, stage: int, effective_latents: float = 0.0) -> None:
        assert self.evaluator is not None
        evaluation, rule = self.evaluator(self.decoder), self.config.adaptive
        kl = evaluation.text.kl
        if stage > 0:
            self.scale = core.adapt_weights(
                self.scale,
                kl=kl,
                num_effective_latents=effective_latents,
                kl_target=rule.kl_target,
                latents_target=rule.latents_target,
                faithfulness_factor=rule.faithfulness_factor,
                monosemanticity_factor=rule.monosemanticity_factor,
            )
        self.evaluations += evaluation.rows(self.done, stage, self.weights())
        values = {"eval_kl": kl, "eval_task_score": evaluation.tasks.score}
        self.curves.log(self.done, **values)
        self.report.metrics(self.name, self.done, values)
        self._stop_if(self.watch.after_evaluation(kl))
        if self.stopped is None:
            self.healthy = self._weights_now()

    def _stop_if(self, reason: str | None) -> None:
        if reason is not None and self.stopped is None:
            self.stopped = f"stopped after PPO step {self.done}: {reason}"
            self.report.alert(f"{self.name} {self.stopped}")

    def _weights_now(self) -> dict[str, Tensor]:
        weights = self.decoder.state_dict()
        return {f"healthy.{name}": tensor.detach().clone() for name, tensor in weights.items()}

    @torch.no_grad()
    def _restore_healthy(self) -> None:
        """Go back to the weights of the last evaluation that was in order."""
        self.decoder.load_state_dict(_under("healthy", self.healthy))

    def _stage_of(self, step: int) -> int:
        ends = 0
        for number, stage in enumerate(self.config.stages, start=1):
            ends += stage.steps
            if step < ends:
                return number
        return len(self.config.stages)

    def _rewards(self) -> list[WeightedReward]:
        if self.kind == "random_reward":
            return [WeightedReward(1.0, RandomReward(self.seed))]
        settings = self.settings
        rewards = decoder_rewards(self.weights(), settings.kl_penalty, settings.consistency)
        if settings.faithfulness_reward:
            return rewards
        return [part for part in rewards if part.reward.name != FaithfulnessReward.name]

    def _replay(self) -> Replay | None:
        settings = self.settings
        if not settings.replays:
            return None
        text = self.text
        if text is None:
            window = settings.replay_window_bytes
            text = ActivationReader(self.activations, "train", window_bytes=window)
        return Replay(
            text,
            self.decoder.frozen.sae,
            self.settings.replay_tokens,
            derive_seed(self.seed, "replay"),
            sequences=self.decoder.looks_back,
        )

    def _prompts(self) -> list[TaskPrompt]:
        """`batch_size` training prompts for each step, each as often as it gets responses; the
        tasks take turns, over steps too where a step has fewer prompts than a round has turns."""
        size, repeats = self.settings.batch_size, self.settings.responses_per_prompt
        turns_of = {name: self.config.task_turns.get(name, 1) for name in self.suite.names}
        # Not one task after another: a step with less than a round should have something of each.
        order = [
            name
            for turn in range(max(turns_of.values()))
            for name, count in turns_of.items()
            if turn < count
        ]
        turns = self.total_steps * size // repeats
        rounds = -(-turns // len(order))
        seed = derive_seed(self.seed, "prompts")
        streams = {
            name: iter(self.suite.make(name, "train", rounds * count, seed))
            for name, count in turns_of.items()
        }
        prompts = [
            prompt
            for turn in range(turns)
            for prompt in [next(streams[order[turn % len(order)]])] * repeats
        ]
        check_lengths(self.decoder.frozen.lm, prompts[: max(size, repeats * len(order))])
        return prompts

    def _save(self) -> None:
        optimizer_tensors, optimizer_state = pack_optimizer(self.learner.optimizer)
        tensors = {
            **{f"now.{name}": tensor for name, tensor in self.decoder.state_dict().items()},
            **self.healthy,
            **{f"critic.{k}": v for k, v in self.learner.critic.state_dict().items()},
            **optimizer_tensors,
        }
        self.rollouts.flush(self.done)
        self.checkpoints.save(
            self.done,
            tensors,
            {
                "optimizer": optimizer_state,
                "normaliser": self.learner.normaliser.state(),
                "curves": self.curves.model_dump(),
                "evaluations": self.evaluations,
                "watch": self.watch.state.model_dump(),
                "scale": list(self.scale),
                "stopped": self.stopped,
            },
            beside=[*self.rollouts.parts(), *self._kept_decoders()],
        )

    @torch.no_grad()
    def _resume(self) -> set[str]:
        """Go back to the newest checkpoint; the names of the parts of its rollout log."""
        checkpoint = self.checkpoints.load()
        known = frozenset[str]() if checkpoint is None else checkpoint.beside
        for folder in self._kept_decoders():
            if not any(name.startswith(f"{folder.name}/") for name in known):
                remove(folder)  # of steps that will be taken again
        if checkpoint is None:
            return set()

        tensors, state = checkpoint.tensors, checkpoint.state
        self.done = checkpoint.step
        # The reference is the decoder as the run was given it, resumed or not.
        self.decoder.load_state_dict(_under("now", tensors))
        device = self.decoder.device
        self.healthy = {k: v.to(device) for k, v in tensors.items() if k.startswith("healthy.")}
        self.learner.critic.load_state_dict(_under("critic", tensors))
        unpack_optimizer(self.learner.optimizer, tensors, state["optimizer"])
        self.learner.normaliser.load_state(state["normaliser"])
        self.curves = Curves.model_validate(state["curves"])
        self.evaluations = [EvaluationRow(*row) for row in state["evaluations"]]
        self.watch.state = CollapseState.model_validate(state["watch"])
        self.scale = core.RewardWeights(*state["scale"])
        self.stopped = state["stopped"]
        return {Path(name).name for name in known if name.startswith("rollouts/")}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `prefix.name`, by name."""
    dot = f"{prefix}."
    return {n.removeprefix(dot): t for n, t in tensors.items() if n.startswith(dot)}

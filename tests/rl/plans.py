"""Plans for the trainer's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rldecoder.config.rl import PpoSettings
from rldecoder.evals.prompts import make_prompts
from rldecoder.rl import core
from rldecoder.rl.learner import Plan
from rldecoder.rl.rewards import decoder_rewards

WEIGHTS = core.RewardWeights(0.5, 0.3, 0.2)


def make_plan(tmp_path: Path, settings: PpoSettings, steps: int, **changes: Any) -> Plan:
    """A plan of generated prompts without replay; `changes` are of its other fields."""
    prompts = [
        prompt
        for step in range(steps)
        for task, count in (
            ("addition", settings.batch_size // 2),
            ("cloze", settings.batch_size - settings.batch_size // 2),
        )
        for prompt in make_prompts(task, "train", count, step)
    ]
    plan = Plan(
        settings=settings,
        prompts=prompts,
        total_steps=steps,
        rewards=lambda: decoder_rewards(WEIGHTS, settings.kl_penalty, settings.consistency),
        loss_weights=lambda: WEIGHTS,
        replay=None,
        after_step=lambda step: False,
        seed=0,
        output_dir=tmp_path / "trl",
    )
    return plan._replace(**changes)

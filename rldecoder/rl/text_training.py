"""More supervised training, as a control of PPO: its text loss and schedule, no responses.

PPO's trainer would sample responses that no loss reads, which is nearly all of its time. What is
taken here are the same optimiser steps on the same text, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from rldecoder.config.rl import PpoSettings
from rldecoder.decoder.distill import LogitBuffers, matmul_precision
from rldecoder.errors import BadInputError
from rldecoder.rl import core
from rldecoder.rl.learner import Learner
from rldecoder.rl.replay import ReplayBatch, text_losses


def require_text(ppo: PpoSettings) -> None:
    """Refuse `text_only` where PPO itself has no loss on text.

    Raises:
        BadInputError: there is none; the settings to change are named.
    """
    if ppo.replay_tokens == 0 or ppo.kl_loss_coef == 0:
        raise BadInputError(
            "More supervised training has no text to train on.",
            "`train_ppo.ppo.replay_tokens` or `kl_loss_coef` is 0.",
            "Set `control_ppo.supervised_continuation: false`, or give both a value.",
        )


def train_on_text(
    learner: Learner,
    settings: PpoSettings,
    replay: Callable[[int], ReplayBatch],
    *,
    total_steps: int,
    first_step: int,
    faithfulness: Callable[[], float],
    after_step: Callable[[int, dict[str, float]], bool],
) -> None:
    """Take the text steps of as many PPO steps; ends early where `after_step` says so.

    Args:
        learner: its decoder is trained; the critic is left alone.
        settings: rates, schedule, inner epochs and minibatches, as of the training to be matched.
        replay: text for an optimiser step (from 0).
        total_steps: PPO steps of the whole training.
        first_step: PPO steps that an earlier, interrupted run has done.
        faithfulness: present weight of the KL loss.
        after_step: told the number of each finished PPO step, from 0, and its metrics.
    """
    optimizer, decoder = learner.optimizer, learner.decoder
    updates = settings.inner_epochs * settings.minibatches
    buffers = LogitBuffers.kept(decoder.frozen.lm.vocab_size)

    # A reloaded optimiser brings the rates of its last step; the schedule starts from peaks.
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    schedule = LambdaLR(
        optimizer,
        lambda done: core.linear_schedule(
            done + first_step * updates,
            warmup_steps=settings.warmup_steps,
            total_steps=total_steps * updates,
        ),
    )

    decoder.train()
    for step in range(first_step, total_steps):
        seen = []
        for update in range(step * updates, (step + 1) * updates):
            with matmul_precision("highest"):  # it must not choose the latents
                text = replay(update)
            loss, _ = text_losses(decoder, text, buffers, entropy=False)
            (settings.kl_loss_coef * faithfulness() * loss).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seen.append(float(loss.detach()))
        if after_step(step, {"text_kl": sum(seen) / len(seen)}):
            return

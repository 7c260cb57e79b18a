"""Publish the final decoder, and say whether it is good enough to be called frozen.

It decides on the test-split numbers that `control_ppo` measured. Of several trainings it publishes
the first, so it decides on that one's own numbers and not on the mean over all.
"""

from __future__ import annotations

import shutil

from rldecoder.artifacts.catalogue import FinalDecoder
from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.rl.controls import FROZEN, SUPERVISED, TrainingScore
from rldecoder.rl.freeze import Freeze, OnTest, decide
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import FreezeInputs

PUBLISHED_TRAINING = 0
"""`train_ppo` publishes its first training as its decoder."""


def run(inputs: FreezeInputs, config: FreezeDecoderConfig, ctx: StageContext) -> Output:
    """Choose, copy, and write down why."""
    controls = inputs.controls.record
    first, supervised = controls.trainings[PUBLISHED_TRAINING], controls.systems[SUPERVISED]

    def decided(training: TrainingScore, verdict: str | None) -> Freeze:
        return decide(
            OnTest(training.kl, training.score, training.drop),
            OnTest(supervised.kl, supervised.score, controls.supervised_drop),
            controls.systems[FROZEN].score,
            control_verdict=verdict,
            judged_by=inputs.controls.stage,
            config=config,
        )

    decision = decided(first, inputs.controls.verdict)

    # How far that hangs on the seed: every training by itself, against the controls of its seed.
    alone = [
        decided(training, "fail" if training.not_beaten else "pass").frozen
        for training in controls.trainings
        if training.not_beaten is not None
    ]
    if len(alone) > 1:
        counts = {"num_trainings": len(alone), "num_frozen": sum(alone)}
        decision = decision.model_copy(update=counts)
        ctx.report.note(f"{sum(alone)} of {len(alone)} trainings would be frozen by themselves")

    # A copy, so that readers of the final decoder need no other artifact.
    chosen = inputs.policy if decision.which == "ppo" else inputs.supervised
    shutil.copytree(chosen.decoder, FinalDecoder.decoder.path(ctx.out))
    FinalDecoder.freeze.save(ctx.out, decision)

    for reason in decision.reasons:
        ctx.report.note(f"not frozen: {reason}")
    return Output(
        decision.headline,
        reasons=tuple(f"the decoder is not frozen: {reason}" for reason in decision.reasons),
    )

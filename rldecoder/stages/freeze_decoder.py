"""Publish the final decoder, and say whether it is good enough to be called frozen.

It decides on the test-split numbers that `control_ppo` measured. Of several trainings it publishes
the first, so it decides on that one's own numbers and not on the mean over all.
"""

from __future__ import annotations

import shutil

from rldecoder.artifacts.catalogue import FinalDecoder
from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.rl.controls import FROZEN, SUPERVISED
from rldecoder.rl.freeze import Measured, decide
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import FreezeInputs

PUBLISHED_TRAINING = 0
"""`train_ppo` publishes its first training as its decoder."""


def run(inputs: FreezeInputs, config: FreezeDecoderConfig, ctx: StageContext) -> Output:
    """Choose, copy, and write down why."""
    controls = inputs.controls.record
    first, supervised = controls.trainings[PUBLISHED_TRAINING], controls.systems[SUPERVISED]
    decision = decide(
        Measured(first.kl, first.score),
        Measured(supervised.kl, supervised.score),
        controls.systems[FROZEN].score,
        control_verdict=inputs.controls.verdict,
        judged_by=inputs.controls.stage,
        config=config,
    )

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

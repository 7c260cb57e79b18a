"""Publish the final decoder, and say whether it is good enough to be called frozen.

Publishes `decoder/`, always loadable, and `freeze.json`. It decides on the test-split numbers that
`control_ppo` measured. Of several trainings it publishes the first, so it decides on that one's own
numbers and not on the mean over all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.rl.controls import FROZEN, SUPERVISED
from rldecoder.rl.freeze import Measured, decide
from rldecoder.schemas import read_json, write_json
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

PUBLISHED_TRAINING = 0
"""`train_ppo` publishes its first training as `decoder/`."""


def run(
    inputs: Mapping[str, InputArtifact], config: FreezeDecoderConfig, ctx: StageContext
) -> StageOutput:
    """Choose, copy, and write down why."""
    verdict = read_json(inputs["control_ppo"].path / "verdict.json")
    systems = verdict["systems"]
    ppo, supervised = (
        Measured(found["kl"], found["score"])
        for found in (verdict["trainings"][PUBLISHED_TRAINING], systems[SUPERVISED])
    )
    decision = decide(
        ppo,
        supervised,
        systems[FROZEN]["score"],
        control_verdict=inputs["control_ppo"].verdict,
        config=config,
    )
    source = "train_ppo" if decision.which == "ppo" else "train_decoder"
    shutil.copytree(inputs[source].path / "decoder", ctx.out / "decoder")
    reasons = list(decision.reasons)
    status = "frozen" if decision.frozen else "not_frozen"
    found = {"status": status, **decision._asdict(), "reasons": reasons}
    write_json(ctx.out / "freeze.json", found)
    for reason in reasons:
        ctx.report.note(f"not frozen: {reason}")
    return StageOutput(
        metrics={
            "frozen": decision.frozen,
            "which": decision.which,
            "kl": decision.kl,
            "task_drop": decision.task_drop,
        },
        reasons=tuple(f"the decoder is not frozen: {reason}" for reason in reasons),
    )

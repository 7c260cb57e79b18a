"""The freeze stage: the decoder it copies and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import pytest

from rldecoder.artifacts.catalogue import Controls, FinalDecoder, Policy, SupervisedDecoder
from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.dashboard.build import freeze_note
from rldecoder.evals.statistics import Measured
from rldecoder.rl.controls import ControlVerdict, SystemRow, TrainingScore
from rldecoder.stages.context import Output
from rldecoder.stages.freeze_decoder import run
from rldecoder.stages.inputs import FreezeInputs
from tests.stages.published import inputs_in, published


def system(name: str, kl: float, score: float) -> SystemRow:
    """Its row over all tasks, with intervals of no width."""
    return SystemRow(
        system=name, gates=False, task="all", num_prompts=20, num_trainings=1,
        score=score, score_low=score, score_high=score, kl=kl, kl_low=kl, kl_high=kl,
        contribution_entropy=None, contribution_entropy_low=None, contribution_entropy_high=None,
        effective_latents=None,
    )  # fmt: skip


def make_inputs(
    folder: Path,
    *,
    ppo_kl: float,
    verdict: Literal["pass", "fail"],
    others: Sequence[tuple[float, float]] = (),
    not_beaten: Sequence[tuple[str, ...]] = (),
) -> FreezeInputs:
    """`others`: KL and score of the trainings after the first; `not_beaten`: of all of them."""
    trainings = [(ppo_kl, 0.8), *others]
    kl, score = (sum(values) / len(trainings) for values in zip(*trainings, strict=True))
    record = ControlVerdict(
        verdict=verdict,
        reasons=(),
        comparisons=(),
        systems={
            "trained": system("trained", kl, score),
            "supervised": system("supervised", 0.45, 0.7),
            "frozen": system("frozen", 0.0, 0.81),
        },
        trainings=tuple(
            TrainingScore(
                kl=kl,
                score=score,
                not_beaten=which,
                drop=Measured(value=0.81 - score, low=0.76 - score, high=0.86 - score),
            )
            for (kl, score), which in zip_longest(trainings, not_beaten)
        ),
        supervised_drop=Measured(value=0.11, low=0.03, high=0.2),
        response_entropy={},
        response_effective_latents={},
    )
    Controls.record.save(folder / Controls.stage, record)
    for kind in (Policy, SupervisedDecoder):
        weights = kind.decoder.path(folder / kind.stage) / "weights"
        weights.parent.mkdir(parents=True)
        weights.write_text(kind.stage)
    controls = published(Controls, folder / Controls.stage, Output(verdict=verdict))
    return inputs_in(FreezeInputs, folder, controls=controls)


@pytest.mark.parametrize(
    ("ppo_kl", "verdict", "which", "frozen"),
    [
        (0.4, "pass", "ppo", True),
        (0.4, "fail", "ppo", False),
        (0.499, "pass", "ppo", True),
        (0.9, "pass", "supervised", False),
    ],
)
def test_publishes_one_of_the_two(tmp_path, context, ppo_kl, verdict, which, frozen):
    ctx = context()
    inputs = make_inputs(tmp_path / "in", ppo_kl=ppo_kl, verdict=verdict)
    output = run(inputs, FreezeDecoderConfig(), ctx)
    source = {"ppo": "train_ppo", "supervised": "train_decoder"}[which]
    assert (ctx.out / "decoder" / "weights").read_text() == source
    freeze = published(FinalDecoder, ctx.out).freeze
    assert freeze.which == output.metrics["which"] == which
    assert freeze.frozen is frozen
    assert freeze.status == ("frozen" if frozen else "not_frozen")
    assert bool(freeze.reasons) is not frozen
    assert len(output.reasons) == len(freeze.reasons)
    assert output.verdict is None
    assert freeze.kl == {"ppo": ppo_kl, "supervised": 0.45}[which]
    interval = {"ppo": (-0.04, 0.06), "supervised": (0.03, 0.2)}[which]
    assert (freeze.task_drop_low, freeze.task_drop_high) == pytest.approx(interval)
    if frozen:
        assert "scores -0.01 [-0.06, +0.04] more than the frozen model." in freeze_note(freeze)


@pytest.mark.parametrize(
    ("first_kl", "other", "frozen"),
    [
        (0.4, (0.9, 0.5), True),  # the mean is neither faithful nor good enough
        (0.495, (0.1, 0.9), True),
        (0.5, (0.1, 0.9), False),  # the mean would do
    ],
)
def test_decides_on_the_training_that_it_publishes(tmp_path, context, first_kl, other, frozen):
    ctx = context()
    inputs = make_inputs(tmp_path / "in", ppo_kl=first_kl, verdict="pass", others=[other])
    output = run(inputs, FreezeDecoderConfig(), ctx)
    freeze = published(FinalDecoder, ctx.out).freeze
    assert (ctx.out / "decoder" / "weights").read_text() == "train_ppo"
    assert freeze.frozen is output.metrics["frozen"] is frozen
    assert freeze.kl == first_kl
    assert freeze.task_drop == pytest.approx(0.01)
    assert freeze.num_trainings is None  # an older record does not say which controls each beat


def test_says_how_many_trainings_would_be_frozen_by_themselves(tmp_path, context):
    ctx = context()
    inputs = make_inputs(
        tmp_path / "in",
        ppo_kl=0.4,
        verdict="pass",
        others=[(0.4, 0.8), (0.4, 0.5), (0.7, 0.9), (0.4, 0.9)],
        not_beaten=[(), ("random_reward",), (), (), ()],
    )
    output = run(inputs, FreezeDecoderConfig(), ctx)
    freeze = published(FinalDecoder, ctx.out).freeze
    assert freeze.frozen
    assert (freeze.num_trainings, freeze.num_frozen) == (5, 2)
    assert "num_frozen" not in output.metrics
    assert freeze_note(freeze).endswith("Of 5 trainings 2 would be by themselves.")

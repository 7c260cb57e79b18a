"""The freeze stage: the decoder it copies and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.schemas import read_json, write_json
from rldecoder.stages.context import InputArtifact
from rldecoder.stages.freeze_decoder import run


def make_inputs(
    folder: Path, *, ppo_kl: float, verdict: str, others: Sequence[tuple[float, float]] = ()
) -> dict[str, InputArtifact]:
    """`others`: KL and score of the trainings after the first."""
    trainings = [(ppo_kl, 0.8), *others]
    kl, score = (sum(values) / len(trainings) for values in zip(*trainings, strict=True))
    systems = {
        "trained": {"kl": kl, "score": score},
        "supervised": {"kl": 0.45, "score": 0.7},
        "frozen": {"kl": 0.0, "score": 0.81},
    }
    write_json(
        folder / "control_ppo" / "verdict.json",
        {"systems": systems, "trainings": [{"kl": kl, "score": score} for kl, score in trainings]},
    )
    for stage in ("train_ppo", "train_decoder"):
        (folder / stage / "decoder").mkdir(parents=True)
        (folder / stage / "decoder" / "weights").write_text(stage)
    return {
        name: InputArtifact(name, name, "0" * 16, folder / name, {}, {}, verdict)
        for name in ("train_ppo", "train_decoder", "control_ppo")
    }


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
    freeze = read_json(ctx.out / "freeze.json")
    assert freeze["which"] == output.metrics["which"] == which
    assert freeze["frozen"] is frozen
    assert freeze["status"] == ("frozen" if frozen else "not_frozen")
    assert bool(freeze["reasons"]) is not frozen
    assert len(output.reasons) == len(freeze["reasons"])
    assert output.verdict is None
    assert freeze["kl"] == {"ppo": ppo_kl, "supervised": 0.45}[which]


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
    freeze = read_json(ctx.out / "freeze.json")
    assert (ctx.out / "decoder" / "weights").read_text() == "train_ppo"
    assert freeze["frozen"] is output.metrics["frozen"] is frozen
    assert freeze["kl"] == first_kl
    assert freeze["task_drop"] == pytest.approx(0.01)

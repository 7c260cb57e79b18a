"""The freeze stage: the decoder it copies and what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.schemas import read_json, write_json
from rldecoder.stages.context import InputArtifact
from rldecoder.stages.freeze_decoder import run


def make_inputs(folder: Path, *, ppo_kl: float, verdict: str) -> dict[str, InputArtifact]:
    systems = {
        "trained": {"kl": ppo_kl, "score": 0.8},
        "supervised": {"kl": 0.45, "score": 0.7},
        "frozen": {"kl": 0.0, "score": 0.81},
    }
    write_json(folder / "control_ppo" / "verdict.json", {"systems": systems})
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
    assert bool(freeze["reasons"]) is not frozen
    assert len(output.reasons) == len(freeze["reasons"])
    assert output.verdict is None
    assert freeze["kl"] == {"ppo": ppo_kl, "supervised": 0.45}[which]

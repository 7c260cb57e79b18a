"""What is said at the end of a run of a decoder that may be called frozen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa

from rldecoder.artifacts.catalogue import Evaluation
from rldecoder.cli.ending import tasks_behind
from rldecoder.config.run import load_run_config
from rldecoder.evals.comparison import TASK_SCORES
from rldecoder.run import Run
from tests.conftest import ROOT


def row(task: str, model: str, drop: float) -> dict[str, object]:
    interval = {"ci_low": 0.3, "ci_high": 0.7, "drop_low": drop - 0.1, "drop_high": drop + 0.1}
    return {"task": task, "model": model, "n": 48, "score": 0.5, "drop": drop, **interval}


def test_a_task_that_lost_is_named_though_the_mean_gained() -> None:
    rows = [
        row("kind", "rl", -0.5),
        row("addition", "rl", 0.2),
        row("cloze", "rl", 0.02),  # less than freezing allows
        row("cloze", "supervised", 0.4),
    ]
    config = load_run_config(ROOT / "configs" / "debug.yaml")
    published = {Evaluation: SimpleNamespace(tasks=pa.Table.from_pylist(rows, schema=TASK_SCORES))}
    run = cast("Run", SimpleNamespace(config=config, artifact=cast("Any", published.get)))
    (said,) = tasks_behind(run, "ppo")
    assert said.endswith("`evaluate`: addition by 0.20 [0.10, 0.30].")
    (said,) = tasks_behind(run, "supervised")
    assert said.endswith("`evaluate`: cloze by 0.40 [0.30, 0.50].")
    published[Evaluation].tasks = pa.Table.from_pylist(rows[:1], schema=TASK_SCORES)
    assert tasks_behind(run, "ppo") == []

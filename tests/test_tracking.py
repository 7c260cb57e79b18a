"""wandb: off by wish, offline without a key, refused online without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rldecoder.errors import BadInputError
from rldecoder.tracking import WandbReporter, wandb_reporter


def run_with(mode: str) -> Any:
    """What the tracker reads of a RunConfig."""
    return SimpleNamespace(
        name="test",
        tracking=SimpleNamespace(wandb=mode, project="p"),
        model_dump=lambda mode: {"name": "test"},
    )


def test_off_gives_nothing(tmp_path: Path) -> None:
    with wandb_reporter(run_with("off"), tmp_path) as reporter:
        assert reporter is None


def test_online_without_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with (
        pytest.raises(BadInputError, match="WANDB_API_KEY"),
        wandb_reporter(run_with("online"), tmp_path),
    ):
        pytest.fail("went online")


def test_metrics_carry_stage_and_own_step() -> None:
    logged: list[dict[str, float]] = []
    fake = SimpleNamespace(
        define_metric=lambda *a, **k: None, log=logged.append, alert=lambda **k: None
    )
    reporter = WandbReporter(fake)
    reporter.metrics("train_sae", 7, {"loss": 0.5})
    reporter.alert("drift")
    assert logged == [{"train_sae/loss": 0.5, "train_sae/step": 7}]


@pytest.mark.slow
def test_offline_run_leaves_a_file(tmp_path: Path) -> None:
    with wandb_reporter(run_with("offline"), tmp_path) as reporter:
        assert reporter is not None
        reporter.metrics("s", 1, {"loss": 1.0})
    assert list(tmp_path.rglob("*.wandb"))

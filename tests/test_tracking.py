"""wandb: off by wish, offline without a key, refused online without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError
from rldecoder.tracking import WandbReporter, wandb_reporter

DEBUG = Path(__file__).resolve().parents[1] / "configs" / "debug.yaml"


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


def test_alerts_lose_passwords() -> None:
    told: list[str] = []
    fake = SimpleNamespace(alert=lambda title, text: told.append(text))
    WandbReporter(fake).alert("cannot reach ftp://user:hunter2@host/x")
    assert told == ["cannot reach ftp://***@host/x"]


@pytest.mark.slow
def test_an_offline_run_leaves_files_without_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the config nor of the command line."""
    url = "ftp://user:hunter2@127.0.0.1/x"
    monkeypatch.setattr("sys.argv", ["rldecoder", "run", "--set", f"mirror={url}"])
    run = load_run_config(DEBUG, [f"mirror={url}", "tracking.wandb=offline"])
    with wandb_reporter(run, tmp_path) as reporter:
        assert reporter is not None
        reporter.metrics("s", 1, {"loss": 1.0})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert list(tmp_path.rglob("*.wandb"))
    assert any(b"sync_tokenizer" in path.read_bytes() for path in files)
    assert not [path for path in files if b"hunter2" in path.read_bytes()]

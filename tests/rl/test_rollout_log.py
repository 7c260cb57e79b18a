"""Rollout rows survive a kill exactly once, and parts leave no trace in the result."""

from __future__ import annotations

from rldecoder.rl.rollout_log import ROLLOUTS, RolloutLog, RolloutRow
from rldecoder.schemas import read_parquet


def row(step: int) -> RolloutRow:
    return RolloutRow(
        step=step, stage=1, task="cloze", prompt_index=0, question="?", answer="box",
        completion=f"text {step}", num_tokens=3, finished=True, task_score=1.0, reward=0.5,
        faithfulness=0.0, monosemanticity=0.1, consistency=0.2, kl_penalty=0.0,
    )  # fmt: skip


def test_a_killed_log_equals_an_undisturbed_one(tmp_path):
    straight = RolloutLog(tmp_path / "a")
    for step in range(6):
        straight.add([row(step)])
    straight.flush(6)
    straight.publish(tmp_path / "a.parquet")

    killed = RolloutLog(tmp_path / "b")
    for step in range(4):
        killed.add([row(step)])
        if step % 2:
            killed.flush(step + 1)
    # The part of step 4 was written, but the checkpoint after it was not: it runs again.
    resumed = RolloutLog(tmp_path / "b", known={"000000002.parquet"})
    for step in range(2, 6):
        resumed.add([row(step)])
    resumed.flush(6)
    resumed.publish(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert read_parquet(tmp_path / "b.parquet")["step"].to_pylist() == list(range(6))
    resumed.publish(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_no_rows(tmp_path):
    log = RolloutLog(tmp_path / "log")
    log.flush(1)
    log.publish(tmp_path / "empty.parquet")
    assert read_parquet(tmp_path / "empty.parquet").schema.names == ROLLOUTS.names

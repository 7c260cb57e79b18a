"""Every rollout in Parquet, in parts that grow with the checkpoints of the run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rldecoder.files import remove
from rldecoder.rl.learner import PpoStep
from rldecoder.schemas import read_parquet, table_schema, write_parquet


class RolloutRow(NamedTuple):
    """A response: see ROLLOUTS."""

    step: int
    stage: int
    task: str
    prompt_index: int
    question: str
    answer: str
    completion: str
    num_tokens: int
    finished: bool
    task_score: float
    reward: float
    faithfulness: float
    monosemanticity: float
    consistency: float
    kl_penalty: float


ROLLOUTS = table_schema(RolloutRow, pa.float32(), stage=pa.int8(), num_tokens=pa.int16())
"""One row a response. `question` is the prompt's last two lines (the few-shot part is always the
same). `reward` is the weighted composite; the parts are unweighted, means per token: nats, share
(0 to 1), cosine (0 to 1), nats; 0 where a run has none of them. Steps and stages count from 0 and
1."""


def rollout_rows(step: PpoStep, stage: int) -> list[RolloutRow]:
    """A row for each response of a PPO step."""
    rollout, rewards = step.rollout, step.rewards
    lengths, totals = rollout.mask.sum(-1).tolist(), rewards.total.sum(-1).tolist()

    def part(name: str, i: int) -> float:
        return float(rewards.parts[name][i]) if name in rewards.parts else 0.0

    return [
        RolloutRow(
            step=step.step,
            stage=stage,
            task=prompt.task,
            prompt_index=prompt.index,
            question="\n".join(prompt.prompt.split("\n")[-2:]),
            answer=prompt.answer,
            completion=rollout.completions[i],
            num_tokens=lengths[i],
            finished=bool(rollout.finished[i]),
            task_score=float(step.task_scores[i]),
            reward=totals[i],
            faithfulness=part("faithfulness", i),
            monosemanticity=part("monosemanticity", i),
            consistency=part("consistency", i),
            kl_penalty=part("kl_penalty", i),
        )
        for i, prompt in enumerate(rollout.prompts)
    ]


class RolloutLog:
    """Rows of finished steps; `flush` makes them outlive the process, together with a checkpoint.

    Args:
        folder: of the parts, in the stage's progress folder.
        known: names of the parts that the checkpoint goes with; all others are dropped.
    """

    def __init__(self, folder: Path, known: Collection[str] = ()) -> None:
        self.folder = folder
        self._rows: list[RolloutRow] = []
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.iterdir():
            if part.name not in known:
                remove(part)

    def add(self, rows: list[RolloutRow]) -> None:
        """Keep rows in memory until `flush`."""
        self._rows += rows

    def flush(self, steps_done: int) -> None:
        """Write the rows since the last flush."""
        if not self._rows:
            return
        columns = dict(zip(RolloutRow._fields, zip(*self._rows, strict=True), strict=True))
        write_parquet(self.folder / f"{steps_done:09d}.parquet", columns, ROLLOUTS)
        self._rows = []

    def publish(self, path: Path) -> None:
        """All parts as one file, the same wherever the parts were cut; the parts stay."""
        tables = [read_parquet(part) for part in self.parts()]
        joined = pa.concat_tables(tables) if tables else ROLLOUTS.empty_table()
        pq.write_table(joined.combine_chunks(), path, compression="zstd")

    def parts(self) -> list[Path]:
        """Files with the rows that were flushed, in the order of steps."""
        return sorted(self.folder.glob("*.parquet"))

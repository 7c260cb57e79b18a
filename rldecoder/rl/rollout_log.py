"""Every rollout in Parquet, in parts that grow with the checkpoints of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rldecoder.schemas import read_parquet, write_parquet

ROLLOUTS = pa.schema(
    [
        ("step", pa.int32()),
        ("stage", pa.int8()),
        ("task", pa.string()),
        ("prompt_index", pa.int32()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("completion", pa.string()),
        ("num_tokens", pa.int16()),
        ("finished", pa.bool_()),
        ("task_score", pa.float32()),
        ("reward", pa.float32()),
        ("faithfulness", pa.float32()),
        ("monosemanticity", pa.float32()),
        ("consistency", pa.float32()),
        ("kl_penalty", pa.float32()),
    ]
)
"""One row a response. `question` is the prompt's last two lines (the few-shot part is always the
same). `reward` is the weighted composite; the parts are unweighted, means per token: nats, share
(0 to 1), cosine (0 to 1), nats. Steps and stages count from 0 and 1."""


class RolloutLog:
    """Rows of finished steps; `flush` makes them outlive the process, together with a checkpoint.

    Args:
        folder: of the parts, in the stage's progress folder.
        resume_at: PPO steps that the checkpoint has done; parts beyond it are dropped.
    """

    def __init__(self, folder: Path, resume_at: int) -> None:
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for part in self._parts():
            if int(part.stem) > resume_at:
                part.unlink()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows in memory until `flush`."""
        self._rows += rows

    def flush(self, steps_done: int) -> None:
        """Write the rows since the last flush, aside and then by rename."""
        if not self._rows:
            return
        columns = {name: [row[name] for row in self._rows] for name in ROLLOUTS.names}
        aside = self.folder / "writing"
        write_parquet(aside, columns, ROLLOUTS)
        aside.rename(self.folder / f"{steps_done:09d}.parquet")
        self._rows = []

    def publish(self, path: Path) -> None:
        """All parts as one file, the same wherever the parts were cut; the parts stay."""
        tables = [read_parquet(part) for part in self._parts()]
        joined = pa.concat_tables(tables) if tables else ROLLOUTS.empty_table()
        pq.write_table(joined.combine_chunks(), path, compression="zstd")

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

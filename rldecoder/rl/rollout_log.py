"""Every rollout in Parquet, in parts that grow with the checkpoints of the run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rldecoder.files import remove
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
        known: names of the parts that the checkpoint goes with; all others are dropped.
    """

    def __init__(self, folder: Path, known: Collection[str] = ()) -> None:
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.iterdir():
            if part.name not in known:
                remove(part)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows in memory until `flush`."""
        self._rows += rows

    def flush(self, steps_done: int) -> None:
        """Write the rows since the last flush."""
        if not self._rows:
            return
        columns = {name: [row[name] for row in self._rows] for name in ROLLOUTS.names}
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

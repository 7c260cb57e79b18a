"""A worker like those of a cluster, in this process."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rldecoder.executors.jobs import AnyWorker, Job
from rldecoder.executors.local import Crew, LocalExecutor
from rldecoder.reporting import Reporter

if TYPE_CHECKING:
    import torch


class Elsewhere(LocalExecutor):
    """Its worker opens all that it needs, and what it computes goes through files."""

    is_here = False

    def open(
        self, job: Job, *, device: torch.device, report: Reporter, here: AnyWorker | None = None
    ) -> AbstractContextManager[Crew]:
        """See `Executor.open`."""
        return super().open(job, device=device, report=report)

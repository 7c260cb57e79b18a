"""A Prefect worker that runs flows of a few seconds itself: it asks, claims and reports as
every worker does, and starts no process.

Arguments: the work pool, the file that gets a line a run, and how many it does at once.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Running
from prefect.workers.base import BaseJobConfiguration, BaseWorker, BaseWorkerResult


class InlineResult(BaseWorkerResult):
    """How a run ended."""


class InlineWorker(BaseWorker[BaseJobConfiguration, Any, InlineResult]):
    """See the module."""

    type = "inline"
    job_configuration = BaseJobConfiguration

    async def run(
        self, flow_run: FlowRun, configuration: BaseJobConfiguration, task_status: Any = None
    ) -> InlineResult:
        """Go through the states of a run."""
        if task_status is not None:
            task_status.started(str(os.getpid()))
        async with get_client() as client:
            answer = await client.set_flow_run_state(flow_run.id, Running())
            if answer.status.value == "ACCEPT":
                with open(sys.argv[2], "a", encoding="utf-8") as log:
                    log.write(f"{flow_run.id} {os.getpid()}\n")
                # As no flow of ours is over in less: a worker that looked before the run began may
                # claim it again once it has ended, which Prefect's server allows.
                await asyncio.sleep(5)
                await client.set_flow_run_state(flow_run.id, Completed())
        return InlineResult(identifier=str(os.getpid()), status_code=0)


if __name__ == "__main__":
    worker = InlineWorker(
        work_pool_name=sys.argv[1], create_pool_if_not_found=False, limit=int(sys.argv[3])
    )
    asyncio.run(worker.start())

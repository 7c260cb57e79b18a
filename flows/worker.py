"""The worker of `make ui`: Prefect's process worker, which starts the project's own flows only.

The server refuses requests that would change what is executed (`flows.commands`). This is the same
look once more, at the place where a command is started: at runs and pools that an older server
kept, and at what Prefect's own automations make.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

from flows.commands import foreign_run

if TYPE_CHECKING:
    from prefect.workers.process import ProcessWorker

POOL = "local"
"""The process work pool that prefect.yaml names."""


class ForeignCommandError(RuntimeError):
    """A run would execute something else than a flow of prefect.yaml."""


def make_worker() -> ProcessWorker:
    """The worker; Prefect reads its settings when it is first imported, so it is imported here."""
    from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

    class OwnJob(ProcessJobConfiguration):
        """A job that is refused unless it runs one of the project's flows."""

        @classmethod
        async def resolve_for_flow_run(cls, flow_run: Any, **given: Any) -> Any:
            """Prefect's own, after a look at everything that decides what is executed."""
            deployment = given.get("deployment")
            if deployment is None and flow_run.deployment_id:
                deployment = await given["client"].read_deployment(flow_run.deployment_id)
            complaint = foreign_run(
                flow_run.model_dump(mode="json"),
                None if deployment is None else deployment.model_dump(mode="json"),
                given["work_pool"].base_job_template,
            )
            if complaint:
                raise ForeignCommandError(complaint)
            return await super().resolve_for_flow_run(
                flow_run, **{**given, "deployment": deployment}
            )

    worker = ProcessWorker(work_pool_name=POOL, create_pool_if_not_found=False)
    # A worker class of our own would be one of two of the type `process`, of which Prefect warns.
    worker.job_configuration = OwnJob
    return worker


async def _work() -> None:
    from prefect.utilities.processutils import setup_signal_handlers_worker

    setup_signal_handlers_worker(os.getpid(), "the worker", print)
    await make_worker().start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_work())

"""Runs whose worker is gone: found by their missing heartbeat, and started again, a few times.

A flow run sends a heartbeat every half minute. An automation of Prefect's ends a run as Crashed
that has sent none for two minutes: its process, its worker or its machine is lost. (Where only the
process dies, its worker says so within seconds.) `make ui` then schedules a crashed run again, up
to a limit; any worker of its pool takes it up, and the store knows what is finished. A run that
only seemed lost does no harm: two runs never build one artifact.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flows.api import Api

HEARTBEAT_SECONDS = 30
"""Prefect's own least."""
SILENCE_SECONDS = 120
NAME = "rldecoder: lost workers"
MOST_RUNS = 3
"""A crashed run is started anew until it has been started so often in all."""
MESSAGE = "Its process, worker or machine was lost: started again by `make ui`."
ENVIRONMENT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}
"""Of workers, whose flow runs inherit it."""


def watch_workers(api: Api) -> None:
    """Make the automation, or bring it up to date; one that people switched off stays off."""
    found = [one for one in api.send("POST", "/automations/filter", {}) if one["name"] == NAME]
    if found:
        wanted = automation(enabled=bool(found[0]["enabled"]))
        api.send("PUT", f"/automations/{found[0]['id']}", wanted)
    else:
        api.send("POST", "/automations/", automation())


def automation(*, enabled: bool = True) -> dict[str, Any]:
    """As Prefect takes it: no heartbeat and no end after a heartbeat."""
    beat = "prefect.flow-run.heartbeat"
    ends = [f"prefect.flow-run.{how}" for how in ("Completed", "Failed", "Cancelled", "Crashed")]
    # A run that waits for a person's answer beats no more than one that has ended.
    waits = [f"prefect.flow-run.{how}" for how in ("Paused", "Suspended", "AwaitingRetry")]
    return {
        "name": NAME,
        "description": f"Ends runs that have given no sign of life for {SILENCE_SECONDS} s.",
        "enabled": enabled,
        "trigger": {
            "type": "event",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "for_each": ["prefect.resource.id"],
            "after": [beat],
            "expect": [beat, *ends, *waits],
            "posture": "Proactive",
            "threshold": 1,
            "within": SILENCE_SECONDS,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "name": "Crashed",
                "message": f"No heartbeat for {SILENCE_SECONDS} s.",
            }
        ],
    }


class CrashedRuns:
    """Starts crashed runs of deployments again.

    Args:
        since: runs that crashed before are left as they are; None: now.
    """

    def __init__(self, api: Api, since: datetime | None = None) -> None:
        self._api, self._since = api, since or datetime.now(UTC)

    def restart(self) -> list[str]:
        """Schedule what crashed and has been started less than `MOST_RUNS` times.

        Returns:
            A line for every run that was.
        """
        wanted = {
            "flow_runs": {
                "state": {"type": {"any_": ["CRASHED"]}},
                "deployment_id": {"is_null_": False},
                "end_time": {"after_": self._since.isoformat()},
            }
        }
        said = []
        for run in self._api.send("POST", "/flow_runs/filter", wanted):
            if run["run_count"] >= MOST_RUNS:
                continue
            state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": MESSAGE}
            self._api.send(
                "POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True}
            )
            said.append(f"the run {run['name']} crashed and is started again")
        return said

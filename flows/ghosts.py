"""Runs that wait for a person's answer while the process that would hear it is gone.

A paused run lives in a process that asks the server whether it was answered. When `make ui` ends,
so does that process; the form stays in the UI, and would take an answer that nobody reads. So at
its end, and at the next start, such runs become suspended ones: an answer then schedules them
anew, and the worker starts a process that finds it. Nothing said is lost, and no form has to be
filled in twice. A run without a deployment cannot be started anew: once its process is gone it is
ended, and its form with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flows.api import Api
from flows.listening import forget, is_deaf

MESSAGE = "`make ui` was stopped: answer or resume, and the run goes on where it was."
DEAF_MESSAGE = "The process that waited for the answers is gone: start the review again."

_SUSPENDED = "Suspended"


def keep_paused_runs(api: Api) -> Iterator[str]:
    """Make every paused run of a deployment one that can be taken up again, and end dead ones.

    Call it while there is no worker: then no run of a deployment has a process. Runs without one
    live in processes of their own, which may go on.

    Yields:
        a line for every run that was changed.
    """
    for run in _paused(api):
        details = run["state"]["state_details"]
        state: dict[str, Any]
        if run["deployment_id"] is None:
            if not is_deaf(run["id"]):
                continue
            state = {"type": "CRASHED", "name": "Crashed", "message": DEAF_MESSAGE}
            said = "has no process that would hear its answer; it was ended"
        elif details.get("pause_reschedule"):
            continue  # it was suspended from the first
        else:
            state = {
                "type": "PAUSED",
                "name": _SUSPENDED,
                "message": MESSAGE,
                "state_details": {**details, "pause_reschedule": True},
            }
            said = "still waits for its answer, and goes on after it"
        api.send("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
        if run["deployment_id"] is None:
            forget(run["id"])
        yield f"the run {run['name']} {said}"


def _paused(api: Api) -> list[Any]:
    """All paused runs, page by page."""
    found: dict[str, Any] = {}
    while True:
        wanted = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}, "offset": len(found)}
        fresh = [
            run for run in api.send("POST", "/flow_runs/filter", wanted) if run["id"] not in found
        ]
        if not fresh:
            return list(found.values())
        found |= {run["id"]: run for run in fresh}

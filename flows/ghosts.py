"""Runs that wait for a person's answer while the process that would hear it is gone.

A paused run lives in a process that asks the server whether it was answered. When `make ui` ends,
so does that process; the form stays in the UI, and would take an answer that nobody reads. So at
its end, and at the next start, such runs become suspended ones: an answer then schedules them
anew, and the worker starts a process that finds it. Nothing said is lost, and no form has to be
filled in twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from flows.api import Api

MESSAGE = "`make ui` was stopped: answer or resume, and the run goes on where it was."

_SUSPENDED = "Suspended"


def keep_paused_runs(api: Api) -> Iterator[str]:
    """Make every paused run of a deployment one that can be taken up again.

    Call it while there is no worker: then none of them has a process. Runs without a deployment
    live in processes of their own, which may go on.

    Yields:
        a line for every run.
    """
    paused = {
        "flow_runs": {
            "state": {"type": {"any_": ["PAUSED"]}},
            "deployment_id": {"is_null_": False},
        },
    }

    # Page by page: a run that has been seen does not leave the filter.
    seen: set[str] = set()
    while True:
        runs = api.send("POST", "/flow_runs/filter", {**paused, "offset": len(seen)})
        fresh = [run for run in runs if run["id"] not in seen]
        if not fresh:
            return
        for run in fresh:
            seen.add(run["id"])
            details = run["state"]["state_details"]
            if details.get("pause_reschedule"):
                continue  # it was suspended from the first

            state = {
                "type": "PAUSED",
                "name": _SUSPENDED,
                "message": MESSAGE,
                "state_details": {**details, "pause_reschedule": True},
            }
            path = f"/flow_runs/{run['id']}/set_state"
            api.send("POST", path, {"state": state, "force": True})
            yield f"the run {run['name']} still waits for its answer, and goes on after it"

"""What the worker of `make ui` may execute: the flows of prefect.yaml, as they are.

Prefect lets whoever may use its API say which command a run executes, in which folder and
environment (`job_variables`, a work pool's `base_job_template`), and which code a deployment
loads (`entrypoint`, `pull_steps`, `path`, storage blocks). The server refuses all of these that
are not the project's own, and the worker looks again before it starts a run: what an older
server, or an automation inside Prefect, let through ends there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from flows.project import PROJECT_FILE, ROOT

HARMLESS = ("labels", "name", "stream_output")
"""Job variables that change nothing of what is executed."""
PULL_STEPS = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
"""What `prefect deploy` writes into a deployment that it makes in the project's folder."""

_FOREIGN_ID = ("infrastructure_document_id", "storage_document_id")


class Pairs(list[tuple[str, Any]]):
    """A JSON object as it was written: a name that comes twice is seen twice."""


@functools.cache
def entrypoints() -> tuple[str, ...]:
    """The flows of prefect.yaml."""
    path = ROOT / PROJECT_FILE
    if not path.is_file():  # a server of a single `rldecoder run` needs no deployments
        return ()
    project = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tuple(deployment["entrypoint"] for deployment in project["deployments"])


@functools.cache
def default_template() -> Mapping[str, Any]:
    """The process worker's own job template."""
    from prefect.workers.process import ProcessWorker

    return ProcessWorker.get_default_base_job_template()


def foreign_command(path: str, content: Any) -> str | None:
    """What a request would change of what the worker executes, or None.

    Args:
        content: its parsed body; objects are mappings, or `Pairs`: of a name that comes twice one
            parser takes the first value and another the last.
    """
    about_deployments = "deployments" in path.split("/")
    for pairs in _objects(content):
        for key, value in pairs:
            complaint = _complaint(key, value, in_deployment=about_deployments)
            if complaint is not None:
                return complaint
    return None


def foreign_run(run: Mapping[str, Any], deployment: Mapping[str, Any] | None, template: Any) -> str:
    """What a run would execute that is not the project's own; empty if nothing.

    Args:
        deployment: its deployment, or None where it has none.
        template: its work pool's job template.
    """
    if deployment is None:
        return "The run belongs to no deployment of prefect.yaml."
    own = {key: run.get(key) for key in ("job_variables", "infrastructure_document_id")}
    parts = ("job_variables", "entrypoint", "pull_steps", "path", *_FOREIGN_ID)
    theirs = {key: deployment.get(key) for key in parts}
    if theirs["entrypoint"] is None:
        return "The deployment has no entrypoint."
    pool = {"base_job_template": template}
    found = (foreign_command("deployments", values) for values in (own, theirs, pool))
    return next(filter(None, found), "")


def _complaint(key: str, value: Any, *, in_deployment: bool) -> str | None:
    if key in ("job_variables", "infra_overrides"):
        return _foreign_variables(value)
    if key == "base_job_template":
        if plain(value) in (None, {}, default_template()):
            return None
        return "A work pool's job template decides which command is run, and is not changed here."
    if key in _FOREIGN_ID and value is not None:
        return f"`{key}` would load code or commands from a block."
    if key == "entrypoint" and value is not None and value not in entrypoints():
        return f"The entrypoint {_short(value)} is no flow of prefect.yaml."
    if key == "pull_steps" and plain(value) not in (None, [], PULL_STEPS):
        return "`pull_steps` are commands, and are not changed here."
    if in_deployment and key == "path" and value not in (None, "", ".", str(ROOT)):
        return f"The path {_short(value)} is not the project's folder."
    return None


def _foreign_variables(value: Any) -> str | None:
    given = plain(value)
    if given in (None, {}):
        return None
    if not isinstance(given, dict):
        return "`job_variables` is no object."
    names = sorted({str(name) for name, _ in _pairs(value) or ()} - set(HARMLESS))
    if names:
        listed = ", ".join(_short(name) for name in names[:5])
        return f"The job variables {listed} change which command is run, where, or with what."
    if "{{" in json.dumps(given):
        return "`job_variables` may hold no templates."
    return None


def _objects(content: Any) -> Iterator[list[tuple[str, Any]]]:
    """Every object in a parsed body, at every depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        pairs = _pairs(value)
        if pairs is not None:
            yield pairs
            waiting.extend(inner for _, inner in pairs)
        elif isinstance(value, list | tuple):
            waiting.extend(value)


def _pairs(value: Any) -> list[tuple[str, Any]] | None:
    """An object's pairs, or None for what is no object."""
    if isinstance(value, Mapping):
        return list(value.items())
    return value if isinstance(value, Pairs) else None


def plain(value: Any) -> Any:
    """A parsed body with mappings for objects."""
    pairs = _pairs(value)
    if pairs is not None:
        return {key: plain(inner) for key, inner in pairs}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

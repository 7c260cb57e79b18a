"""The deployments of prefect.yaml, without undoing what people changed in the UI.

`prefect deploy` writes everything anew: a schedule that someone paused would run again. Here a
deployment that is there already keeps its schedules and its settings, unless prefect.yaml itself
says something new since it was last applied; only what belongs to the code (the entrypoint, the
form) always follows it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from flows.api import Api
from flows.project import PROJECT_FILE, ROOT
from rldecoder.errors import NoResourceError

APPLIED_FILE = "applied-deployments.json"
"""What prefect.yaml said when it was last applied; in the Prefect home."""

_FILE = "deployments.yaml"
_TAIL_CHARACTERS = 1500


class Settings(BaseModel):
    """What people may change in the UI. The defaults are what `prefect deploy` makes of settings
    that prefect.yaml leaves out."""

    model_config = ConfigDict(frozen=True, extra="allow")

    parameters: object = {}
    description: str | None = None
    tags: list[str] = []
    paused: bool = False
    concurrency_limit: object = None


class Entry(Settings):
    """A deployment in prefect.yaml."""

    name: str
    entrypoint: str
    schedules: object = None


class Found(Settings):
    """A deployment on the server."""

    id: str
    name: str
    entrypoint: str | None


def deploy(api: Api, home: Path, env: Mapping[str, str]) -> None:
    """Apply prefect.yaml.

    Args:
        home: the Prefect home.
        env: of the process that applies it, with the server's address and password.

    Raises:
        NoResourceError: it cannot be applied.
    """
    project = yaml.safe_load((ROOT / PROJECT_FILE).read_text(encoding="utf-8"))
    wanted = [Entry.model_validate(entry) for entry in project["deployments"]]
    before = _applied(home)
    there = {found.name: found for found in _on_server(api)}

    entries, kept = [], []
    for entry in wanted:
        found = there.get(entry.name)
        if found is None or found.entrypoint != entry.entrypoint:
            entries.append(entry.model_dump(exclude_unset=True))
            continue

        # Without the key, `prefect deploy` leaves the schedules of a deployment alone.
        last = before.get(entry.name, entry)  # a home of an older version has no record
        left_out = {"schedules"} if entry.schedules == last.schedules else set()
        entries.append(entry.model_dump(exclude_unset=True, exclude=left_out))
        mine = {
            key: value
            for key in Settings.model_fields
            if getattr(entry, key) == getattr(last, key)
            and (value := getattr(found, key)) != getattr(entry, key)
        }
        if mine:
            kept.append((found.id, mine))
    _apply({**project, "deployments": entries}, home, env)
    for identity, mine in kept:
        api.send("PATCH", f"/deployments/{identity}", mine)
    said = {entry.name: entry.model_dump(exclude_unset=True) for entry in wanted}
    (home / APPLIED_FILE).write_text(json.dumps(said, indent=1), encoding="utf-8")


def _on_server(api: Api) -> list[Found]:
    found = api.send("POST", "/deployments/filter", {})
    limits = [one.get("global_concurrency_limit") or {} for one in found]
    return [
        Found.model_validate({**one, "concurrency_limit": limit.get("limit")})
        for one, limit in zip(found, limits, strict=True)
    ]


def _applied(home: Path) -> dict[str, Entry]:
    try:
        return TypeAdapter(dict[str, Entry]).validate_json((home / APPLIED_FILE).read_bytes())
    except (OSError, ValueError):  # never applied, or killed while it was written
        return {}


def _apply(project: object, home: Path, env: Mapping[str, str]) -> None:
    path = home / _FILE
    path.write_text(yaml.safe_dump(project), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all",
         "--prefect-file", str(path)],
        env=dict(env), cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip()
        raise NoResourceError("prefect.yaml cannot be applied.", output[-_TAIL_CHARACTERS:])

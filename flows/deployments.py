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
from typing import Any

import yaml

from flows.api import Api
from rldecoder.errors import NoResourceError

ROOT = Path(__file__).resolve().parents[1]
APPLIED_FILE = "applied-deployments.json"
"""What prefect.yaml said when it was last applied; in the Prefect home."""

_FILE = "deployments.yaml"
_UNSAID: Mapping[str, Any] = {"parameters": {}, "description": None, "tags": [], "paused": False}
"""What `prefect deploy` makes of settings that prefect.yaml leaves out."""
_TAIL_CHARACTERS = 1500


def deploy(api: Api, home: Path, env: Mapping[str, str]) -> None:
    """Apply prefect.yaml.

    Args:
        home: the Prefect home.
        env: of the process that applies it, with the server's address and password.

    Raises:
        NoResourceError: it cannot be applied.
    """
    project = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    wanted = {entry["name"]: entry for entry in project["deployments"]}
    before = _applied(home)
    there = {found["name"]: found for found in api.send("POST", "/deployments/filter", {})}

    kept: list[tuple[str, dict[str, Any]]] = []
    entries = []
    for name, entry in wanted.items():
        found = there.get(name)
        if found is None or found["entrypoint"] != entry["entrypoint"]:
            entries.append(entry)
            continue

        last = before.get(name, entry)  # a home of an older version has no record
        if entry.get("schedules") == last.get("schedules"):
            # Without the key, `prefect deploy` leaves the schedules of a deployment alone.
            entry = {key: value for key, value in entry.items() if key != "schedules"}
        entries.append(entry)
        limit = found.get("global_concurrency_limit") or {}
        now = {**{key: found[key] for key in _UNSAID}, "concurrency_limit": limit.get("limit")}
        mine = {key: value for key, value in now.items() if entry.get(key) == last.get(key)}
        kept.append((found["id"], _beyond(mine, entry)))
    _apply({**project, "deployments": entries}, home, env)
    for identity, mine in kept:
        if mine:
            api.send("PATCH", f"/deployments/{identity}", mine)
    (home / APPLIED_FILE).write_text(json.dumps(wanted, indent=1), encoding="utf-8")


def _beyond(mine: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that the file does not give by itself."""
    return {k: v for k, v in mine.items() if v != entry.get(k, _UNSAID.get(k))}


def _applied(home: Path) -> dict[str, Any]:
    try:
        applied = json.loads((home / APPLIED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # never applied, or killed while it was written
        return {}
    return applied if isinstance(applied, dict) else {}


def _apply(project: Mapping[str, Any], home: Path, env: Mapping[str, str]) -> None:
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

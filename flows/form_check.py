"""A form's settings are looked at before its run is made: who is wrong hears it at the form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.places import CONFIGS
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError


def unusable(path: str, content: Any) -> BadInputError | None:
    """What is wrong with the config and the overrides of a run that is to be made; None if nothing.

    Configs elsewhere are left to the worker, which knows what forms may read.

    Args:
        content: its body, of plain objects and lists.
    """
    parts = path.strip("/").split("/")
    if parts[:2] != ["api", "deployments"] or parts[3:] != ["create_flow_run"]:
        return None
    given = content.get("parameters") if isinstance(content, Mapping) else None
    values = given.get("parameters") if isinstance(given, Mapping) else None
    if not isinstance(values, Mapping):
        return None
    config, overrides = values.get("config"), values.get("overrides") or []
    if not isinstance(config, str) or not isinstance(overrides, list):
        return None  # the form's schema refuses it
    if config not in {file.stem for file in CONFIGS.glob("*.yaml")}:
        return None
    try:
        load_run_config(CONFIGS / f"{config}.yaml", [str(one) for one in overrides])
    except BadInputError as error:
        return error
    return None

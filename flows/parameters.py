"""What a person may fill in when a run is triggered: the typed form of the Prefect UI.

No import here may stand under TYPE_CHECKING: the form is made from the annotations at run time,
and an annotation that cannot be resolved gives an empty form.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.json_schema import JsonSchemaValue

from flows.places import CONFIGS, allowed_here, check_config, check_overrides, check_place
from rldecoder.artifacts.opening import store_place
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.named import config_path
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError
from rldecoder.runner import store_for
from rldecoder.stages.table import STAGES, stage_named


def _config_menu(schema: JsonSchemaValue) -> None:
    """The known configs as a menu of the form, beside a path of one's own."""
    text = {key: schema.pop(key) for key in ("type", "minLength", "maxLength")}
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    schema["anyOf"] = [
        {"title": "of configs/", "type": "string", "enum": known},
        {"title": "another's path", **text},
    ]


def or_empty(given: str) -> Callable[[JsonSchemaValue], None]:
    """What the form calls the two ways to answer: Prefect's own words are `str` and `None`."""

    def name_both(schema: JsonSchemaValue) -> None:
        for way in schema["anyOf"]:
            way["title"] = "empty" if way.get("type") == "null" else given

    return name_both


StageName = Annotated[str, Field(json_schema_extra={"enum": [stage.name for stage in STAGES]})]


class RunParameters(BaseModel):
    """Which run, and where it is kept."""

    # Without this, a misspelt key would be dropped and the run would start all the same.
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )

    config: str = Field("quickstart", min_length=1, max_length=1024, json_schema_extra=_config_menu)
    """The run's YAML: one of configs/, or the path of another."""
    overrides: list[str] = []
    """Settings changed for this run, each of the form `train_sae.k=32`."""
    store: str | None = Field(None, max_length=1024, json_schema_extra=or_empty("a place"))
    """The artifact store, a folder or s3://bucket/prefix; empty takes the YAML's."""

    def load(self) -> tuple[RunConfig, ArtifactStore]:
        """Read the YAML and open the store.

        Raises:
            BadInputError: no such file, settings that cannot be used, or, in a run that a form
                started, a place that is not allowed there (`flows.places`).
        """
        path, allowed = _find(self.config), allowed_here()
        root = None if self.store is None else store_place(self.store)
        if allowed is None:
            run = load_run_config(path, self.overrides)
            return run, store_for(run, root)
        check_config(path, allowed)
        own = load_run_config(path)
        if root is not None:
            check_place("store", root, allowed, own)
        for what, place in self.named_files().items():
            check_place(what, place, allowed, own)
        run = load_run_config(path, self.overrides)
        check_overrides(run, own, allowed)
        return run, store_for(run, root)

    @property
    def run_name(self) -> str:
        """What the run is called in the UI: config, how far it goes, and four digits of its own."""
        until = getattr(self, "until", None)
        digits = int(uuid.UUID(str(flow_run.id)).hex[:8], 16) % 10_000 if flow_run.id else 0
        parts = [Path(self.config).stem, *([f"until-{until}"] if until else []), f"{digits:04d}"]
        return "-".join(parts)

    def named_files(self) -> dict[str, Path]:
        """Further files that the form names."""
        return {}


class PipelineParameters(RunParameters):
    """Which run, where it is kept, and how far it goes."""

    until: StageName | None = Field(None, json_schema_extra=or_empty("a stage"))
    """Stop after this stage; empty runs all of them."""

    @field_validator("until")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                stage_named(value)
            except BadInputError as error:
                raise ValueError(str(error)) from error
        return value


def _find(config: str) -> Path:
    """The YAML that a person means: a path that exists, else a name in configs/."""
    if _is_file(Path(config)):
        return Path(config)
    named = CONFIGS / f"{config}.yaml"
    return named if _is_file(named) else config_path(config)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name can be, or with a NUL in it
        return False

"""What a person may fill in when a run is triggered: the typed form of the Prefect UI.

No import here may stand under TYPE_CHECKING: the form is made from the annotations at run time,
and an annotation that cannot be resolved gives an empty form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rldecoder.artifacts import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError
from rldecoder.runner import store_for
from rldecoder.stages.table import STAGES, stage_named

ROOT = Path(__file__).resolve().parents[1]

StageName = Annotated[str, Field(json_schema_extra={"enum": [stage.name for stage in STAGES]})]


class RunParameters(BaseModel):
    """Which run, and where it is kept."""

    # Without this, a misspelt key would be dropped and the run would start all the same.
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )

    config: str = "quickstart"
    """The run's YAML: a path, or the name of a file in configs/ (debug, quickstart, ...)."""
    overrides: list[str] = []
    """Settings changed for this run, each of the form `train_sae.k=32`."""
    store: str | None = None
    """The folder of the artifact store; empty takes the one that the YAML names."""

    def load(self) -> tuple[RunConfig, ArtifactStore]:
        """Read the YAML and open the store.

        Raises:
            BadInputError: no such file, or settings that cannot be used.
        """
        run = load_run_config(_find(self.config), self.overrides)
        root = None if self.store is None else Path(self.store)
        return run, store_for(run, root)


class PipelineParameters(RunParameters):
    """Which run, where it is kept, and how far it goes."""

    until: StageName | None = None
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
    named = ROOT / "configs" / f"{config}.yaml"
    return named if not Path(config).is_file() and named.is_file() else Path(config)

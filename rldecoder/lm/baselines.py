"""What the frozen model reaches by itself, as later stages and people read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import AfterValidator, ValidationError

from rldecoder.errors import DamagedFileError
from rldecoder.schemas import JsonRecord, Scalar, optional

Rounded = Annotated[float, AfterValidator(lambda value: float(f"{value:.4g}"))]
"""Four digits, for the reader; the table of lenses has them in full."""


class NextToken(JsonRecord):
    """The frozen model on a split."""

    accuracy: Rounded
    """Share of tokens whose most likely token is the next one."""
    ce_nats: Rounded
    """Mean cross-entropy of the next token."""


class LensQuality(JsonRecord):
    """A lens on a split (see `rldecoder.lm.lens.PredictionMeans`)."""

    accuracy: Rounded
    """Share of tokens whose most likely token is the next one."""
    agreement: Rounded
    """Share of tokens where it is the frozen model's most likely one."""
    kl: Rounded
    """Mean KL(frozen || lens), nats per token."""
    ce: Rounded
    """Mean cross-entropy of the next token, nats."""


class JacobianFit(JsonRecord):
    """How well a mean Jacobian is known (see `rldecoder.lm.jacobian.JacobianMap`)."""

    positions: int
    """Over which it is the mean."""
    relative_error: Rounded
    """Its standard error over positions, |SE| / |J|."""


class LayerLenses(JsonRecord):
    """The lenses at one layer."""

    ridge_strength: float
    """Of the affine lens."""
    logit_test: LensQuality
    """Logit lens, held-out text."""
    logit_ood: LensQuality | None = optional()
    """Logit lens, another kind of text; absent where there is none."""
    affine_test: LensQuality
    """Affine lens, held-out text."""
    affine_ood: LensQuality | None = optional()
    """Affine lens, another kind of text; absent where there is none."""
    jacobian: JacobianFit | None = optional()
    """The Jacobian lens's map; absent, with what follows, where none was made."""
    jacobian_test: LensQuality | None = optional()
    """Jacobian lens, held-out text."""
    jacobian_ood: LensQuality | None = optional()
    """Jacobian lens, another kind of text; absent where there is none."""


class TaskScore(JsonRecord):
    """The frozen model on a verifiable task."""

    score: Rounded
    """Mean over prompts, 0 to 1."""
    ci95: tuple[Rounded, Rounded]
    """Its interval."""
    prompts: int
    """How many."""
    shown_working_right: Rounded | None = optional()
    """Addition: share of completions whose shown working is right."""


class BaselineRecord(JsonRecord):
    """Everything that was measured, for people: YAML, in this order."""

    model: str
    """Its name."""
    tokens: dict[str, int]
    """Read of each split."""
    frozen: dict[str, NextToken]
    """By split."""
    lenses: dict[int, LayerLenses]
    """By layer."""
    tasks: dict[str, TaskScore]
    """By name."""

    def save(self, path: Path) -> None:
        """Write it."""
        text = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it back.

        Raises:
            DamagedFileError: the file is missing, no YAML, or of another form.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, yaml.YAMLError, ValidationError) as error:
            raise DamagedFileError(
                f"{path} is not what this version publishes there.",
                str(error).splitlines()[0],
                "Delete the artifact's folder and run again; it will be rebuilt.",
            ) from error


class Timing(JsonRecord):
    """How fast, and with how much memory; differs between machines."""

    tokens_per_second: float
    """Through all layers of the frozen model."""
    peak_memory_bytes: int
    """Of the accelerator where there is one, else of the process."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        return self.model_dump()

"""The catalogue: every stage's files, each named once, and readable by the name that it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from rldecoder.artifacts.base import Artifact, Maybe
from rldecoder.artifacts.catalogue import PHASES, FinalDecoder, SaeGate, TrainedSae
from rldecoder.artifacts.manifests import MANIFEST
from rldecoder.run import Run
from rldecoder.stages.table import STAGES

KINDS = [stage.artifact for stage in STAGES]


def test_every_stage_has_a_class_of_its_own_and_a_phase() -> None:
    assert [kind.stage for kind in KINDS] == [stage.name for stage in STAGES]
    assert len(set(KINDS)) == len({kind.kind for kind in KINDS}) == len(STAGES)
    assert {kind for kinds in PHASES.values() for kind in kinds} == set(KINDS)


def test_a_name_is_that_of_one_file() -> None:
    for kind in KINDS:
        names = [file.name for file in kind.files().values()]
        assert names
        assert len(set(names)) == len(names)
        assert MANIFEST not in names


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.stage)
def test_every_file_of_a_finished_run_is_read_by_its_name(run: Run, kind: type[Artifact]) -> None:
    artifact = run.artifact(kind)
    for name, file in kind.files().items():
        content = getattr(artifact, name)
        assert content is not None or isinstance(file, Maybe)
        assert getattr(artifact, name) is content  # read once
        if isinstance(content, Path):
            assert content.exists() or isinstance(file, Maybe)


def test_headline_numbers_are_those_of_the_records(run: Run) -> None:
    sae = run.artifact(TrainedSae)
    assert sae.best.headline.items() <= sae.metrics.items()
    assert run.artifact(FinalDecoder).freeze.which in ("ppo", "supervised")
    assert run.artifact(SaeGate).verdict in ("pass", "fail")

"""The typed form's models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows import phases
from flows.form_check import unusable
from flows.parameters import PipelineParameters, RunParameters
from flows.phases import decoder, explanations, features, interpretation, last_stage, prepare, rl
from flows.review import ReviewParameters
from rldecoder.errors import BadInputError
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT


def test_a_config_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    by_name, store = RunParameters(config="debug", store=str(tmp_path / "s")).load()
    by_path, _ = RunParameters(
        config=str(ROOT / "configs" / "debug.yaml"), store=str(tmp_path / "s")
    ).load()
    assert by_name == by_path
    assert store.root == tmp_path / "s"


def test_overrides_apply(tmp_path: Path) -> None:
    run, _ = RunParameters(config="debug", overrides=["train_sae.k=8"], store=str(tmp_path)).load()
    assert run.train_sae.k == 8


def test_a_config_that_is_not_there_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="cannot be read"):
        RunParameters(config="no-such-run").load()


def test_unknown_keys_and_stages_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        PipelineParameters(confg="debug")
    with pytest.raises(ValidationError, match="no stage called"):
        PipelineParameters(until="nowhere")
    assert PipelineParameters(until="report").until == "report"


def test_the_form_is_a_menu_of_the_known_configs() -> None:
    schema = PipelineParameters.model_json_schema()["properties"]["config"]
    menu, path = schema["anyOf"]
    assert {"quickstart", "debug", "own_text"} <= set(menu["enum"])
    assert path["type"] == "string"
    assert schema["default"] == "quickstart"
    assert "type" not in schema


@pytest.mark.parametrize(("field", "given"), [("store", "a place"), ("until", "a stage")])
def test_the_form_says_what_may_stay_empty(field: str, given: str) -> None:
    """Prefect's own words for the two are `str` and `None`."""
    ways = PipelineParameters.model_json_schema()["properties"][field]["anyOf"]
    assert [way["title"] for way in ways] == [given, "empty"]


def test_a_run_is_named_after_its_config_and_its_end() -> None:
    named = PipelineParameters(config="configs/debug.yaml", until="gate_sae").run_name
    assert re.fullmatch(r"debug-until-gate_sae-\d{4}", named)
    assert re.fullmatch(r"quickstart-\d{4}", RunParameters().run_name)


def test_what_is_wrong_with_a_form_is_said_before_its_run_is_made() -> None:
    path = "/api/deployments/123/create_flow_run"

    def said(where: str = path, **values: object) -> str:
        wrong = unusable(where, {"parameters": {"parameters": values}})
        return "" if wrong is None else str(wrong)

    assert "did you mean k" in said(config="debug", overrides=["train_sae.kk=3"])
    assert "not of the form a.b=c" in said(config="debug", overrides=["train_sae.k"])
    assert said(config="debug", overrides=["train_sae.k=3"]) == ""
    # Not a run that is made, and a config that the worker decides about.
    assert said("/api/flow_runs/1/resume", config="debug", overrides=["x.y=3"]) == ""
    assert said(config="/etc/passwd", overrides=["x.y=3"]) == ""
    assert unusable(path, {"parameters": {}}) is None
    assert unusable(path, None) is None


def test_there_is_a_flow_for_every_phase() -> None:
    flows = [prepare, features, decoder, rl, interpretation, explanations]
    assert [flow.name for flow in flows] == list(dict.fromkeys(s.phase for s in STAGES))
    assert [last_stage(flow.name) for flow in flows] == [
        "frontier", "gate_sae", "gate_decoder", "freeze_decoder", "cluster_features", "report",
    ]  # fmt: skip
    assert all("parameters" in flow.parameters.properties for flow in flows)


@pytest.mark.parametrize(("wanted", "resumed"), [(False, False), (True, False), (True, True)])
def test_interpretation_may_end_with_a_review(
    monkeypatch: pytest.MonkeyPatch, wanted: bool, resumed: bool
) -> None:
    done: list[object] = []
    monkeypatch.setattr(phases, "run_from_parameters", lambda given: done.append(given) or [])
    monkeypatch.setattr(phases, "ask", done.append)
    monkeypatch.setattr(phases, "is_resumed", lambda: resumed)
    parameters = {"config": "debug", "reviewer": "ann", "wait": "suspend"}
    phases.interpretation.fn(phases.InterpretationParameters(**parameters, review=wanted))
    pipeline = PipelineParameters(config="debug", until="cluster_features")
    # Taken up again after an answer, it must not rebuild the labels that it asks about.
    expected: list[object] = [] if resumed else [pipeline]
    assert done == expected + ([ReviewParameters(**parameters)] if wanted else [])

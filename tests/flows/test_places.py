"""What a form of `make ui` may name, and that everybody else may name what they like."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from flows.parameters import RunParameters
from flows.places import ALLOWED_ENV, ELSEWHERE, FILES, ROOT, allowed_here, allowed_with
from flows.review import ReviewParameters
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError
from tests.flows.ui_client import Ui

DEBUG = (ROOT / "configs" / "debug.yaml").read_text()


@pytest.fixture
def confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in the worker of `make ui --allow-config ... --allow-store ...`."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "stores").mkdir()
    allowed = allowed_with([tmp_path / "configs"], [tmp_path / "stores"])
    for name, value in allowed.as_env().items():
        monkeypatch.setenv(name, value)
    assert allowed_here() == allowed
    return tmp_path


def test_what_is_allowed_is_taken(confined: Path) -> None:
    (confined / "configs" / "mine.yaml").write_text(DEBUG + "\nmirror: memory://x\n")
    _, store = RunParameters(config="debug", overrides=["train_sae.k=8"]).load()
    assert store.root == Path("artifacts").absolute()
    inside = str(confined / "stores" / "new")
    run, store = RunParameters(
        config=str(confined / "configs" / "mine.yaml"), store=inside,
        overrides=[f"label_features.reviews={inside}/r.jsonl", "ingest.ood_sources=[]"],
    ).load()  # fmt: skip
    assert (str(store.root), run.mirror) == (inside, "memory://x")
    ReviewParameters(config="debug", file=f"{inside}/r.jsonl", store=inside).load()


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"config": "/etc/shadow"}, r"config.*not one that a form may name.*--allow-config"),
        ({"config": "../../etc/passwd"}, "--allow-config"),
        ({"config": "/dev/zero"}, "--allow-config"),
        ({"config": "debug\0"}, "--allow-config"),
        ({"config": "{tmp}/link.yaml"}, "--allow-config"),
        ({"config": "x" * 1000}, "--allow-config"),
        ({"store": "{tmp}/elsewhere"}, r"store.*not one that a form may name.*--allow-store"),
        ({"store": "{tmp}/stores/../elsewhere"}, "--allow-store"),
        ({"store": "{tmp}/stores/out/x"}, "--allow-store"),
        ({"overrides": ["store=/tmp"]}, "may not set store"),
        ({"overrides": ["mirror=file:///tmp/exfil"]}, "may not set mirror"),
        ({"overrides": ["mirror={tmp}/stores/x"]}, "may not set mirror"),
        ({"overrides": ["ingest.sources=[{{type: local, paths: [/etc]}}]"]},
         r"may not set ingest\.sources\.paths"),
        ({"overrides": ["ingest.sources=[{{type: dataset, name: /etc}}]"]},
         r"may not set ingest\.sources\.name"),
        ({"overrides": ["sync_tokenizer.model=/tmp/evil.yaml"]}, r"sync_tokenizer\.model"),
        ({"overrides": ["sync_tokenizer.model=evil.yaml"]}, r"sync_tokenizer\.model"),
        ({"overrides": ["sync_tokenizer.model=folder", "sync_tokenizer.path=/tmp/x"]},
         r"sync_tokenizer\.path"),
        ({"overrides": ["sync_tokenizer.model=hub", "sync_tokenizer.repo=artifacts/x"]},
         r"sync_tokenizer\.repo"),
        ({"overrides": ["label_features.reviews=/etc/passwd"]}, r"label_features\.reviews"),
        ({"overrides": ["label_features.labelers=[predicate, llm]",
                        "label_features.llm={{labeler: {{kind: endpoint, model: m, "
                        "base_url: 'https://evil.example/v1', api_key_env: AWS_SECRET}}}}"]},
         r"base_url|api_key_env"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_by_name(
    confined: Path, parameters: dict[str, Any], complaint: str
) -> None:
    (confined / "link.yaml").symlink_to(ROOT / "configs" / "debug.yaml")
    (confined / "configs" / "link.yaml").symlink_to("/etc/passwd")
    (confined / "stores" / "out").symlink_to("/tmp")

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return value.format(tmp=confined)

    given = {"config": "debug"} | {key: filled(value) for key, value in parameters.items()}
    if given["config"].endswith("/link.yaml"):  # one leads in, which counts, and one leads out
        RunParameters(config=given["config"]).load()
        given["config"] = str(confined / "configs" / "link.yaml")
    with pytest.raises(BadInputError, match=complaint):
        RunParameters(**given).load()


def test_a_review_file_is_a_place_too(confined: Path) -> None:
    with pytest.raises(BadInputError, match=r"review file.*--allow-store"):
        ReviewParameters(config="debug", file="/etc/cron.d/x").load()


def test_called_from_python_it_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOWED_ENV, raising=False)
    (tmp_path / "mine.yaml").write_text(DEBUG)
    run, store = RunParameters(
        config=str(tmp_path / "mine.yaml"), store=str(tmp_path / "s"),
        overrides=[f"mirror=file://{tmp_path}/m"],
    ).load()  # fmt: skip
    assert (store.root, run.mirror) == (tmp_path / "s", f"file://{tmp_path}/m")


HARMLESS = {
    "name", "description", "project", "device", "packages", "subset", "split", "text_column",
    "title_column", "document_separator", "licence", "extra_probes", "title", "model",
    "architecture", "task_turns", "response_kl_factors", "hook_name", "model_name", "tasks",
}  # fmt: skip
"""Settings with free text that names no place. `model` and `name` do in some values: see above."""


def test_every_setting_with_free_text_is_known() -> None:
    """A new setting must be put among the places, or here among the others."""
    known = {*FILES, *ELSEWHERE, *HARMLESS}
    found = set(_texts(RunConfig, set()))
    assert found - known == set()
    assert {"mirror", "paths", "reviews", "base_url"} <= found


def _texts(model: type[BaseModel], seen: set[type]) -> typing.Iterator[str]:
    if model in seen:
        return
    seen.add(model)
    for name, field in model.model_fields.items():
        for part in _parts(field.annotation):
            if part in (str, Path):
                yield name
            elif isinstance(part, type) and issubclass(part, BaseModel):
                yield from _texts(part, seen)


def _parts(annotation: Any) -> typing.Iterator[Any]:
    origin = get_origin(annotation)
    if origin is typing.Literal:
        return
    if origin is None or (isinstance(annotation, types.GenericAlias) and not get_args(annotation)):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _parts(part)


@pytest.mark.slow
def test_the_worker_confines_forms(ui: Ui, tmp_path_factory: pytest.TempPathFactory) -> None:
    wrong = {"config": "debug", "overrides": ["train_sae.kk=3"]}
    refused = ui.trigger("pipeline/pipeline-debug", wrong)
    assert refused.status_code == 422
    assert "did you mean k" in refused.json()["detail"]
    outside = tmp_path_factory.getbasetemp().parent / "outside-of-what-is-allowed"
    given = {"config": "debug", "until": "sync_tokenizer", "store": str(outside)}
    run = ui.trigger("pipeline/pipeline-debug", given).raise_for_status().json()["id"]
    state = ui.finished(run)
    assert state["type"] == "FAILED"
    # One line that says what to do, with no name of a class and no traceback.
    assert "Error" not in state["message"]
    assert "\n" not in state["message"]
    assert "not one that a form may name" in state["message"]
    assert "--allow-store" in state["message"]
    assert not outside.exists()

"""What errors say of settings: the key, the kind, and hardly ever a value."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rldecoder.config.problems import shown, shown_key
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError
from rldecoder.lm.specs import SPEC_FOLDER, load_model_spec

DEBUG = Path(__file__).resolve().parents[2] / "configs" / "debug.yaml"
SECRET = "sk-PASTED-aaaabbbbccccdddd"
PASSWORD = "hunter2 correct horse"


@pytest.mark.parametrize("secret", [SECRET, PASSWORD, "hunter2"])
@pytest.mark.parametrize(
    ("form", "named"),
    [
        ("train_sae: S", "train_sae"),
        ("train_sae: [S, S]", "train_sae"),
        ("train_sae: {lr: {password: S}}", "train_sae.lr"),
        ("tracking: S", "tracking"),
        ("tracking: {api_key: S}", "tracking.api_key"),
        ("OPENAI_API_KEY: S", "OPENAI_API_KEY"),
        ("mirror: [S]", "mirror"),
        ("ingest: {sources: S}", "ingest.sources"),
        ("ingest: {sources: [S]}", "ingest.sources.0"),
        ("label_features: {llm: {labeler: S}}", "label_features.llm.labeler"),
        ("label_features: {llm: {labeler: {kind: endpoint, model: m, base_url: S}}}", "base_url"),
        ("label_features: {llm: {labeler: {kind: endpoint, model: m, api_key_env: S, "
         "base_url: 'https://h/v1'}}}", "api_key_env"),
        ("label_features: {llm: {labeler: {kind: endpoint, model: m, "
         "base_url: 'https://u:S@h/v1'}}}", "base_url"),
    ],
)  # fmt: skip
def test_a_malformed_section_is_named_and_not_repeated(
    form: str, named: str, secret: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sync_tokenizer: {model: random}\n" + form.replace("S", secret) + "\n")
    with pytest.raises(BadInputError) as caught:  # `name` is missing, too
        load_run_config(path)
    assert named in str(caught.value)
    assert secret not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    "override",
    [f"train_sae={SECRET}", f"tracking.wandb={SECRET}", f"name.deeper={SECRET}",
     f"train_sae.{SECRET}=1", f"train_sae.k=[{SECRET}", SECRET, f"mirror={{a: {SECRET}}}",
     f"description={SECRET}", f"sync_tokenizer.extra_probes=[x, {SECRET}]"],
)  # fmt: skip
def test_overrides_are_not_repeated(override: str) -> None:
    with pytest.raises(BadInputError) as caught:
        load_run_config(DEBUG, [override])
    assert SECRET not in str(caught.value)


def test_a_model_spec_is_not_repeated(tmp_path: Path) -> None:
    values = yaml.safe_load((SPEC_FOLDER / "gpt2-medium.yaml").read_text())
    for change in ({"sources": SECRET}, {"architecture": {"x": PASSWORD}}, {SECRET: 1}):
        (tmp_path / "gpt2-medium.yaml").write_text(yaml.safe_dump(values | change))
        with pytest.raises(BadInputError) as caught:
            load_model_spec("gpt2-medium", tmp_path)
        assert SECRET not in str(caught.value)
        assert PASSWORD not in str(caught.value)


def test_short_plain_values_are_shown_for_they_help() -> None:
    assert [shown(v) for v in ("bf16", 3, None, True, {"a": 1}, [1, 2])] == [
        "'bf16'", "3", "null", "true", "a mapping with 1 key", "a list of 2 items",
    ]  # fmt: skip
    assert shown("x" * 21) == "a text of 21 characters"
    assert shown("hf_abcdef") == shown("ftp://u:p@h") == shown("Bearer x") == "a text"
    assert len(shown_key("k" * 500)) < 50
    assert "\x1b" not in shown_key("\x1b[31m")


def test_unknown_keys_within_lists_and_alternatives_name_the_nearest() -> None:
    with pytest.raises(BadInputError, match=r"pathz: unknown key; did you mean paths"):
        load_run_config(DEBUG, ["ingest.sources=[{type: local, paths: [x], pathz: [x]}]"])

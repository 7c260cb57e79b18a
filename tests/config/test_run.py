"""Run configs: every YAML loads, every key is known and documented, errors name all problems."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from rldecoder.config.base import Config
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError
from rldecoder.runner import plan
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"
EXPERIMENTS = ROOT / "docs" / "experiments"
EVERY = sorted([*CONFIGS.glob("*.yaml"), *EXPERIMENTS.glob("*.yaml")])


@pytest.mark.parametrize("path", EVERY, ids=lambda p: p.stem)
def test_every_config_loads(path: Path) -> None:
    assert load_run_config(path).name


def test_the_four_promised_configs_are_there() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert {"debug", "quickstart", "linear", "gpt2_phase1", "scale"} <= names


def test_the_long_training_reuses_the_linear_runs_stages() -> None:
    """Its YAML says so: where they are published, training starts at once."""
    long = plan(load_run_config(EXPERIMENTS / "ppo_plan_smollm.yaml"))
    quick = plan(load_run_config(CONFIGS / "linear.yaml"))
    same = [name for name in long if long[name].digest == quick[name].digest]
    assert same == [stage.name for stage in STAGES][: len(same)]
    assert same[-1] == "gate_decoder"


def test_sections_are_the_stages() -> None:
    stages = {stage.name for stage in STAGES}
    sections = {name for name in RunConfig.model_fields if name in stages}
    assert sections == stages
    assert all(load_run_config(CONFIGS / "debug.yaml").stage(name) for name in stages)


def models(root: type[BaseModel]) -> set[type[BaseModel]]:
    """A config class and every config class below it."""
    found: set[type[BaseModel]] = set()
    queue: list[Any] = [root]
    while queue:
        item = queue.pop()
        if isinstance(item, type) and issubclass(item, Config):
            if item not in found:
                found.add(item)
                queue += [field.annotation for field in item.model_fields.values()]
        else:
            queue += get_args(item)
    return found


def test_every_setting_is_documented() -> None:
    stages = {stage.name for stage in STAGES}
    bare = [
        f"{model.__name__}.{name}"
        for model in models(RunConfig)
        for name, field in model.model_fields.items()
        if not field.description and not (model is RunConfig and name in stages)
    ]
    assert bare == []


def test_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = (CONFIGS / "debug.yaml").read_text()
    path.write_text(text + "\nsed: 1\n")
    with pytest.raises(BadInputError, match="did you mean seed"):
        load_run_config(path)
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"train_sae\.kk: unknown key; did you mean k"):
        load_run_config(path, ["train_sae.kk=3"])


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(BadInputError) as caught:
        load_run_config(CONFIGS / "debug.yaml", ["seed=-1", "train_sae.k=0", "nonsense=1"])
    assert all(word in str(caught.value) for word in ("seed", "train_sae.k", "nonsense"))


def test_overrides_are_yaml_values() -> None:
    run = load_run_config(CONFIGS / "debug.yaml", ["seed=7", "train_sae.k=3", "mirror=null"])
    assert (run.seed, run.train_sae.k, run.mirror) == (7, 3, None)


def test_an_override_changes_one_setting_where_yaml_shares_a_value(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(
        "name: shared\nsync_tokenizer: {model: random}\n"
        "ingest: {budget_tokens: &budget {train: 5000, test: 900}}\n"
        "cache_activations: {budget_tokens: *budget}\n"
    )
    run = load_run_config(path, ["ingest.budget_tokens.train=70000"])
    assert run.ingest.budget_tokens.train == 70_000
    assert run.cache_activations.budget_tokens.train == 5_000
    assert run.cache_activations.budget_tokens.test == run.ingest.budget_tokens.test == 900


@pytest.mark.parametrize("override", ["seed", "=3", "name.deeper=1"])
def test_malformed_overrides(override: str) -> None:
    with pytest.raises(BadInputError):
        load_run_config(CONFIGS / "debug.yaml", [override])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "!!python/object/apply:os.getcwd []"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError):
        load_run_config(path)
    with pytest.raises(BadInputError, match="cannot be read"):
        load_run_config(tmp_path / "absent.yaml")


def test_hook_layer_without_a_lens_is_refused_before_any_work() -> None:
    with pytest.raises(BadInputError, match=r"lens_layers \[1, 3\] lacks .*hook_layer 2"):
        load_run_config(CONFIGS / "debug.yaml", ["cache_activations.hook_layer=2"])


@pytest.mark.parametrize(
    "override",
    [
        "baselines.ridge_strengths=[-1.0]",
        "baselines.ridge_strengths=[0.1, .inf]",
        "gate_sae.l0_range=[-1, 5]",
        "gate_sae.l0_range=[5, 1]",
        "train_sae.alert_l0=[.nan, 5]",
        "train_ppo.adaptive.faithfulness_factor=-1",
        "train_ppo.ppo.interpolation_max_kl=-1",
        "label_features.predicate.offsets=[1]",
        "frontier.ks=[0]",
        "seed=0123",
        "train_sae.k=yes",
        "train_sae.budget_tokens=1:00:00",
        "train_sae.lr=.inf",
        "device_timeout_seconds=.inf",
        "train_sae.retrain={sae: x, reasons: yes}",
        "sync_tokenizer={model: hub, repo: ../../x}",
        "sync_tokenizer={model: hub, repo: a/b, revision: ../../../etc/passwd}",
        "sync_tokenizer={model: hub, repo: a/b, revision: --upload-pack=x}",
    ],
)
def test_numbers_and_names_that_make_no_sense_are_refused(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(BadInputError, match=key.replace(".", r"\.")):
        load_run_config(CONFIGS / "debug.yaml", [override])


def numbers_without_a_bound(schema: Any, place: str) -> set[str]:
    """Settings of a JSON schema whose number may be negative without anybody having said so."""
    if isinstance(schema, list):
        return {name for part in schema for name in numbers_without_a_bound(part, place)}
    if not isinstance(schema, dict):
        return set()
    if schema.get("type") in ("integer", "number") and not {"minimum", "exclusiveMinimum"} & set(
        schema
    ):
        return {place}
    found: set[str] = set()
    for name, part in schema.items():
        if name in ("properties", "$defs"):
            for key, value in part.items():
                found |= numbers_without_a_bound(value, f"{place}.{key}" if place else key)
        elif name in ("anyOf", "items", "prefixItems", "additionalProperties", "allOf"):
            found |= numbers_without_a_bound(part, place)
    return found


def test_every_number_has_a_bound() -> None:
    """A new setting says what is too small; those named here may be any number, for a reason."""
    found = numbers_without_a_bound(RunConfig.model_json_schema(), "")
    assert found == {
        "Endpoint.seed",  # some servers take -1 for a random one
        "GateSaeConfig.min_explained_variance",  # of an SAE worse than the mean it is negative
        "PredicateSettings.offsets",  # none is above 0
        "TrainSaeConfig.matryoshka_prefixes",  # checked together: they rise from above 0 to 1
    }


def test_a_mirrors_password_is_in_no_dump() -> None:
    url = "ftp://user:hunter2@127.0.0.1/x"
    run = load_run_config(CONFIGS / "debug.yaml", [f"mirror={url}"])
    assert run.mirror == url
    sent = str(to_jsonable_python({"parameters": {"run": run}}))  # as Prefect keeps a flow's
    for text in (run.model_dump_json(), str(run.model_dump()), repr(run), str(run), sent):
        assert "hunter2" not in text


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("tracking.wandb=off", 'tracking.wandb="off"'),
        ("tracking.wandb=false", 'tracking.wandb="off"'),
        ("tracking.wandb=OFF", 'tracking.wandb="off"'),
        ("train_sae.lr=1e-3", "train_sae.lr=0.001"),
        ("train_sae.budget_tokens=1e5", "train_sae.budget_tokens=100000"),
        ("sweep_sae.ks=16", "sweep_sae.ks=[16]"),
        ("sweep_sae.expansions=2.5", "sweep_sae.expansions=[2.5]"),
        ("baselines.lens_layers=3", "baselines.lens_layers=[3]"),
        ("baselines.lens_layers=all", 'baselines.lens_layers="all"'),
        ("ingest.sources={type: pysource}", "ingest.sources=[{type: pysource}]"),
        ("ingest.sources={type: local, paths: a.txt}",
         "ingest.sources=[{type: local, paths: [a.txt]}]"),
        ("sync_tokenizer.extra_probes=hello", "sync_tokenizer.extra_probes=[hello]"),
        ("train_ppo.tasks=cloze", "train_ppo.tasks=[cloze]"),
        ("cluster_features.label_embedding=false", "cluster_features.label_embedding=none"),
        ("ingest.bos=false", "ingest.bos=never"),
        ("ingest.bos=true", "ingest.bos=always"),
        ("gate_sae.on_fail=Warn", "gate_sae.on_fail=warn"),
    ],
)  # fmt: skip
def test_what_people_write_is_what_they_mean(override: str, same: str) -> None:
    path = CONFIGS / "debug.yaml"
    assert load_run_config(path, [override]) == load_run_config(path, [same])


@pytest.mark.parametrize(
    "override",
    ["tracking.wandb=true", "tracking.wandb=of", "sweep_sae.ks=x", "gate_sae.l0_range=5"],
)
def test_what_could_mean_two_things_is_still_refused(override: str) -> None:
    with pytest.raises(BadInputError, match="cannot be used"):
        load_run_config(CONFIGS / "debug.yaml", [override])


def test_bos_is_one_setting_for_model_and_text() -> None:
    path = CONFIGS / "debug.yaml"
    usual, never = load_run_config(path), load_run_config(path, ["ingest.bos=never"])
    assert (usual.sync_tokenizer.bos, never.sync_tokenizer.bos) == ("auto", "never")
    # What was built before the setting came keeps its address; what it changes gets another.
    assert "bos" not in usual.sync_tokenizer.digest_fields()
    assert never.sync_tokenizer.digest_fields()["bos"] == "never"
    assert never.ingest.digest_fields() == usual.ingest.digest_fields()
    # A run that was written out and read again is the same run.
    assert RunConfig.model_validate(never.model_dump(mode="json")) == never
    with pytest.raises(BadInputError, match=r"set ingest\.bos"):
        load_run_config(path, ["sync_tokenizer.bos=always"])


def test_a_name_with_a_slash_is_one_on_the_hub() -> None:
    path, name = CONFIGS / "debug.yaml", "google/gemma-2-2b"
    short = load_run_config(path, [f"sync_tokenizer.model={name}"])
    long = load_run_config(path, ["sync_tokenizer.model=hub", f"sync_tokenizer.repo={name}"])
    assert short == long
    own = load_run_config(path, ["sync_tokenizer.model=specs/mine.yaml"])
    assert own.sync_tokenizer.model == "specs/mine.yaml"
    with pytest.raises(BadInputError, match="`path` is not read"):
        load_run_config(path, [f"sync_tokenizer.model={name}", "sync_tokenizer.path=there"])

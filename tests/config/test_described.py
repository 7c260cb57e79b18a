"""Every setting is described: name, kind, default, meaning; nothing sends people to the source."""

from __future__ import annotations

import re

import pytest
import yaml
from rich.console import Console

from rldecoder.cli.settings import show_settings
from rldecoder.config.base import Config
from rldecoder.config.described import sections, stages
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT


def settings(which: str | None, width: int = 80) -> str:
    console = Console(record=True, width=width)
    show_settings(which, console)
    return console.export_text()


def test_all_stages_are_there_and_every_setting_has_a_meaning() -> None:
    assert list(stages()) == [stage.name for stage in STAGES]
    assert all(stages().values())
    told = [one for section in sections() for one in section.settings]
    assert len(told) > 200
    for one in told:
        assert len(one.meaning) > 4, one.name
        assert "rldecoder/" not in one.meaning, one.name


def test_a_name_is_what_set_takes_and_a_default_is_the_one_there_is() -> None:
    run = load_run_config(ROOT / "configs" / "debug.yaml")
    checked = 0
    for section in sections():
        for one in section.settings:
            if "[]" in one.name or one.default == "required":
                continue
            owner: type[Config] = RunConfig
            value: object = run
            *parents, last = one.name.split(".")
            for part in parents:
                value = getattr(value, part, None)
                if not isinstance(value, Config):
                    break
                owner = type(value)
            else:
                names = {info.alias or name: info for name, info in owner.model_fields.items()}
                default = names[last].get_default(call_default_factory=True)
                if isinstance(default, int | float | str | bool) or default is None:
                    shown = yaml.safe_load(one.default)
                    assert shown == default or str(shown) == str(default), one.name
                    checked += 1
    assert checked > 150


def test_a_stage_is_listed_at_eighty_columns() -> None:
    for name in stages():
        text = settings(name)
        assert f"# {name}:" in text
        assert max(map(len, text.splitlines())) <= 80
    shown = " ".join(settings("train_sae").split())
    assert "train_sae.k: 64 (whole number, above 0)" in shown
    assert "Active latents a token" in shown
    sources = settings("ingest")
    assert sources.count("ingest.sources[].document_separator:") == 1
    assert "ingest.budget_tokens.ood: 8_192" in sources


def test_one_setting_and_those_of_the_run() -> None:
    alone = settings("train_sae.k")
    assert "train_sae.k:" in alone
    assert "train_sae.lr:" not in alone
    assert re.search(r"^seed: 0 ", settings("run"), re.MULTILINE)
    listed = {line.split(" ")[0] for line in settings(None).splitlines()}
    assert {"run", "s3", "tracking", "executor", *(stage.name for stage in STAGES)} <= listed
    with pytest.raises(BadInputError, match=r"train_sae\.kk") as error:
        settings("train_sae.kk")
    assert "train_sae.k" in error.value.why

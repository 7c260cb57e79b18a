"""The README is true: its commands, files and settings exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from rldecoder.config.run import RunConfig
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKDOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fenced(language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([a-z-]+)", "\n".join(fenced("bash")), flags=re.MULTILINE))
    assert {"quickstart", "test", "ui"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_rldecoder_commands_and_configs_exist() -> None:
    from typer.main import get_command

    from rldecoder.cli.commands import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"^rldecoder ([a-z-]+)(.*)$", "\n".join(fenced("bash")), flags=re.MULTILINE)
    assert {name for name, _ in used} == set(commands)
    for _, rest in used:
        for config in re.findall(r"configs/\S+\.yaml", rest):
            assert (ROOT / config).is_file(), config


def test_example_yaml_is_a_valid_run() -> None:
    (block,) = fenced("yaml")
    assert RunConfig.model_validate(yaml.safe_load(block)).name == "mine"


def test_measured_output_is_shown() -> None:
    assert "<!-- quickstart-output -->" not in README, "the README still lacks its output"
    assert "Targets of the original plan" in README


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"

"""The command line: help, exit codes, error texts. The full pipeline is in test_end_to_end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.forked import ForkServer

LOOKING = """
import contextlib, io, sys
from rldecoder.cli.commands import run_command_line
said = io.StringIO()
for line in sys.argv[1:]:
    sys.argv = ["rldecoder", *line.split()]
    with contextlib.redirect_stdout(said):
        run_command_line()
slow = ("torch", "transformers", "numpy", "pyarrow", "prefect", "jinja2", "httpx")
print([name for name in slow if name in sys.modules])
"""


def test_commands_that_only_look_import_nothing_slow(tmp_path: Path) -> None:
    lines = ["--help", f"status configs/quickstart.yaml --store {tmp_path}", "models", "devices",
             "settings train_sae"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", LOOKING, *lines],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr


def test_help_lists_the_commands(forks: ForkServer) -> None:
    result = forks.run("--help")
    assert result.returncode == 0
    for command in (
        "run",
        "status",
        "explain",
        "serve",
        "report",
        "export",
        "smoke",
        "models",
        "devices",
        "estimate-labels",
    ):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "cannot be read"),
        (["run", "configs/debug.yaml", "--set", "train_sae.kk=1"], "did you mean k"),
        (["run", "configs/debug.yaml", "--until", "nowhere", "--no-prefect"], "no stage called"),
        (["status"], "Missing argument"),
        (["estimate-labels", "configs/debug.yaml"], "names no language model"),
        (
            [
                "estimate-labels",
                "configs/debug.yaml",
                "--store",
                "/nonexistent-store",
                "--set",
                "label_features.labelers=[predicate, llm]",
                "--set",
                "label_features.llm={}",
            ],
            "has not come far enough to estimate labels",
        ),
        (["explain", "configs/debug.yaml", " "], "prompt is empty"),
        (["explain", "configs/debug.yaml", "\udcff"], "not valid Unicode"),
        (["judge", "score", "/dev/zero", "/dev/zero"], "no regular file"),
        (["smoke", "no-such-model"], "no-such-model"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_exits_2_with_one_message(
    forks: ForkServer, arguments: list[str], message: str, tmp_path: Path
) -> None:
    if len(arguments) > 1 and arguments[0] in ("run", "explain"):
        arguments = [*arguments, "--store", str(tmp_path)]
    result = forks.run(*arguments)
    assert result.returncode == 2, result.stderr
    assert message in " ".join((result.stderr + result.stdout).split())
    assert "Traceback" not in result.stderr


def test_explain_and_report_before_the_run_say_what_is_missing(
    forks: ForkServer, tmp_path: Path
) -> None:
    for command in (["explain", "configs/debug.yaml", "Hello"], ["report", "configs/debug.yaml"]):
        result = forks.run(*command, "--store", str(tmp_path))
        assert result.returncode == 2
        said = " ".join(result.stderr.split())
        assert "Missing" in said
        # The one command that makes it, with what was given here.
        assert "Make it: rldecoder run configs/debug.yaml --store" in said


def test_status_of_an_empty_store_is_a_table(forks: ForkServer, tmp_path: Path) -> None:
    store = tmp_path / "a store"
    status = forks.run(
        "status", "configs/debug.yaml", "--store", str(store), "--set", "train_sae.k=8"
    )
    again = f"configs/debug.yaml --store '{store}' --set train_sae.k=8"
    assert f"0 of 19 stages are there; next: rldecoder run {again}" in status.stdout
    assert status.returncode == 0
    assert status.stdout.count("missing") == 19

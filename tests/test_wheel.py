"""The wheel, in an environment of its own and another folder, does what the checkout does."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import yaml

from rldecoder.cli.layout import lay_out
from rldecoder.cli.starting import init
from rldecoder.config.named import SHIPPED_FOLDER, config_path, shipped_configs
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError
from tests.wheel_check import ROOT, build, clean_env, install

READ = """
import sys, rldecoder
run = rldecoder.open_run("debug", sys.argv[1])
print(rldecoder.__file__)
print(len(run.read("The import statement").features(-1)))
"""


@pytest.mark.slow
def test_the_wheel_runs_from_elsewhere(debug_store: Path, tmp_path: Path) -> None:
    sdist, wheel = build(tmp_path / "dist")
    assert (sdist.name, wheel.name) == (
        "rl_decoder-0.2.0.tar.gz",
        "rl_decoder-0.2.0-py3-none-any.whl",
    )
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "rldecoder", "flows", "tasks", "rl_decoder-0.2.0.dist-info",
    }  # fmt: skip

    scripts = install(wheel, tmp_path / "env")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(scripts / command[0]), *command[1:]], cwd=elsewhere, env=clean_env(),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    # By its name, to the same digests: every stage of the checkout's run is taken as it is.
    shown = run("rldecoder", "run", "debug", "--no-prefect", "--store", str(debug_store))
    assert "0 stages built, 19 reused" in shown
    place, features = run("python", "-c", READ, str(debug_store)).splitlines()
    assert Path(place).is_relative_to(tmp_path / "env")
    assert int(features) > 0

    # A project folder whose deployments load the flows that are installed.
    run("rldecoder", "init", "project")
    project = yaml.safe_load((elsewhere / "project" / "prefect.yaml").read_text())
    entrypoints = [one["entrypoint"].split(":") for one in project["deployments"]]
    assert all(Path(path).is_relative_to(tmp_path / "env") for path, _ in entrypoints)
    assert all(flow in Path(path).read_text() for path, flow in entrypoints)


def test_every_config_is_shipped_and_laid_out(tmp_path: Path) -> None:
    here = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").glob("**/*.yaml")}
    assert lay_out(tmp_path / "new") == len(here) + 1
    for name in here:
        copied = (tmp_path / "new" / "configs" / name).read_bytes()
        assert (
            copied == (SHIPPED_FOLDER / name).read_bytes() == (ROOT / "configs" / name).read_bytes()
        )
    assert lay_out(tmp_path / "new") == len(here) + 1  # what is the same may be there


def test_init_without_text_lays_them_out(tmp_path: Path) -> None:
    init(tmp_path / "new")
    assert (tmp_path / "new" / "configs" / "debug.yaml").read_bytes() == (
        ROOT / "configs" / "debug.yaml"
    ).read_bytes()
    assert (tmp_path / "new" / "prefect.yaml").is_file()
    with pytest.raises(BadInputError, match=r"Nothing says what mine\.yaml is to read"):
        init(tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_a_config_of_ones_own_is_never_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "configs" / "sweep.yaml"
    mine.parent.mkdir()
    mine.write_text("name: mine\n")
    with pytest.raises(BadInputError, match=r"sweep\.yaml is there already"):
        lay_out(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.yaml")] == ["sweep.yaml"]


def test_names_of_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(shipped_configs()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert load_run_config("debug") == load_run_config(ROOT / "configs" / "debug.yaml")
    with pytest.raises(BadInputError, match="cannot be read"):
        load_run_config("nothing-of-this-name")
    assert config_path("../debug") == Path("../debug")
    assert config_path("x" * 5_000) == Path("x" * 5_000)

    # The folder's own comes first, and a file that is there is meant itself.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "debug.yaml").write_text("name: mine\n")
    assert config_path("debug") == Path("configs") / "debug.yaml"
    (tmp_path / "debug").write_text("name: nearer\n")
    assert config_path("debug") == Path("debug")

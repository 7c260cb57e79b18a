"""`rldecoder export CONFIG release DIR`, `--push`, and `--release` of the commands that look."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rldecoder.cli.commands import app
from rldecoder.errors import BadInputError
from rldecoder.release.manifest import read_release
from tests.conftest import ROOT

CONFIG = str(ROOT / "configs" / "debug.yaml")


def rldecoder(*arguments: object) -> None:
    """The command, in this process."""
    app([str(argument) for argument in arguments], standalone_mode=False)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def release(debug_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("release") / "it"
    rldecoder("export", CONFIG, "release", out, "--store", debug_store, "--licence", "cc-by-4.0")
    return out


def test_it_is_written_and_listed_and_nothing_is_sent(
    release: Path, debug_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_release(release)
    assert "license: cc-by-4.0" in (release / "README.md").read_text()
    rldecoder("export", "release", release, "--push", "ann/toy", "--dry-run")
    said = capsys.readouterr().out
    assert all(name in said for name in manifest.files)
    assert "would go to ann/toy (private); nothing was sent" in said

    with pytest.raises(BadInputError, match=r"is a release already.*--overwrite"):
        rldecoder("export", CONFIG, "release", release, "--store", debug_store)
    rldecoder(
        "export", CONFIG, "release", release, "--store", debug_store, "--overwrite",
        "--supervised", "--push", "ann/toy", "--dry-run", "--public",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "would go to ann/toy (public); nothing was sent" in said
    assert "explain --release" in said
    assert "train_decoder" in read_release(release).artifacts


def test_explain_takes_a_release_in_place_of_a_run(
    release: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rldecoder("explain", "--release", release, "The import statement finds")
    assert "The import statement finds" in capsys.readouterr().out
    rldecoder("explain", "The//hat is ./in/", "--release", release, "--html", tmp_path / "p.html")
    assert "The//hat is ./in/" in capsys.readouterr().out  # a prompt, not a path
    assert "debug" in (tmp_path / "p.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--release", "X"], "Missing argument 'PROMPT'"),
        (["explain", CONFIG], "Missing argument 'PROMPT'"),
        (["explain", CONFIG, "The", "--release", "X"], "CONFIG cannot go with --release"),
        (["explain", "The", "--release", "X", "--set", "a=1"], "--set cannot go with --release"),
        (["explain", CONFIG, "The", "--model", "M"], "--model is for releases"),
        (["explain", "The", "--release", "./absent"], "is not a release. There is no such folder"),
        (["serve"], "Missing argument 'CONFIG'"),
        (["serve", "--release", "./absent"], "is not a release"),
        (["serve", CONFIG, "--release", "X", "--store", "Y"], "CONFIG, --store cannot go"),
        (["export", CONFIG, "release"], "Missing argument 'OUT'"),
        (["export", CONFIG, "release", "o", "--dry-run"], "--dry-run goes with --push"),
        (["export", CONFIG, "release", "o", "--push", "one"], "names no repository"),
        (["export", CONFIG, "delphi", "o", "--push", "a/b"], "are for a release"),
        (["export", CONFIG, "elsewhere", "o"], "Nothing is known of the tool 'elsewhere'"),
        (["export", "release", "./absent"], "Nothing is to be done"),
        (["export", "release", "./absent", "--push", "a/b"], "is not a release"),
        (["export", "release", "X", "--push", "a/b", "--overwrite"], "have no meaning"),
    ],
    ids=lambda value: " ".join(map(str, value))[-50:] if isinstance(value, list) else None,
)
def test_what_cannot_be_meant_is_said_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=message):
        rldecoder(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_not_come_so_far(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not come far enough to be released"):
        rldecoder("export", CONFIG, "release", tmp_path / "o", "--store", tmp_path / "empty")
    assert not (tmp_path / "o").exists()


def test_spoilt_ones_are_not_served(release: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(release, tmp_path / "spoilt"))
    (spoilt / "settings.json").write_text("{}")
    for command in (["serve", "--port", "0"], ["explain", "The"]):
        with pytest.raises(Exception, match=r"settings.json of the release cannot be trusted"):
            rldecoder(*command, "--release", spoilt)

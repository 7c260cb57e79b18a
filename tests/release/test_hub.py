"""Upload and download, against a hub on the loopback. No token but the environment's is used."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as constants
import pytest

from rldecoder import open_release
from rldecoder.artifacts.manifests import MANIFEST
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.release.hub import hub_place, push_release
from rldecoder.release.manifest import read_release
from tests.release.conftest import PROMPT, Released, reseal
from tests.release.fake_hub import FakeHub, serving

REPO = "ann/toy-release"
TOKEN = "hf_" + "Q7rT2uV9wX4yZ1aB6cD3eF8gH5"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(REPO, TOKEN)
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        # A login that was kept on the disk: never to be sent.
        stored = tmp_path / "stored-token"
        stored.write_text("hf_storedStoredStoredStored")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    assert hub.faults == []


def test_what_was_pushed_is_what_is_opened(
    hub: FakeHub, released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.commit({".gitattributes": b"*", "old.safetensors": b"of another release"})
    upload = push_release(released.root, REPO)
    assert upload.private
    assert upload.commit == f"{constants.ENDPOINT}/{REPO}/commit/{list(hub.commits)[-1]}"
    manifest = read_release(released.root)
    assert set(hub.files) == {*manifest.files, MANIFEST, ".gitattributes"}
    for name, entry in manifest.files.items():
        assert hashlib.sha256(hub.files[name]).hexdigest() == entry.sha256
    assert not any(TOKEN.encode() in data for data in hub.files.values())

    notes: list[str] = []
    opened = open_release(REPO, note=notes.append)
    assert notes == [f"downloading {REPO} from the hub"]
    assert opened.manifest == manifest
    assert opened.read(PROMPT).kl == open_release(released.root).read(PROMPT).kl
    asked = len(hub.asked)
    at = list(hub.commits)[-1]
    again = open_release(f"{REPO}@{at}", note=notes.append)
    assert again.root == opened.root
    assert len(notes) == 1
    assert not [path for _, path in hub.asked[asked:] if "/resolve/" in path]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_release(REPO, revision=at).manifest == manifest
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(BadInputError, match="is not a release"):
        open_release(REPO, revision=first)


def test_a_release_of_the_hub_is_checked_as_any_other(
    hub: FakeHub, copied: Path, released: Released
) -> None:
    files = {
        path.relative_to(copied).as_posix(): path.read_bytes()
        for path in copied.rglob("*")
        if path.is_file()
    }
    hub.commit({**files, "malware.py": b"print(1)"})
    opened = open_release(REPO)  # what is not listed is not even fetched
    assert not (opened.root / "malware.py").exists()
    hub.commit({**files, "sae/sae/cfg.json": files["sae/sae/cfg.json"] + b" "})
    with pytest.raises(DamagedFileError, match=r"sae/sae/cfg.json of the release"):
        open_release(REPO)
    reseal(copied, schema_version=9)
    hub.commit({**files, MANIFEST: (copied / MANIFEST).read_bytes()})
    with pytest.raises(BadInputError, match="newer RL-Decoder"):
        open_release(REPO)


def test_the_token_is_the_environments_or_none(
    hub: FakeHub, released: Released, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_release(released.root, REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInputError, match="read from HF_TOKEN in the environment"):
        push_release(released.root, REPO)
    with pytest.raises(BadInputError, match="a private one needs its token in HF_TOKEN"):
        open_release(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWrongWrongWrong")
    with pytest.raises(BadInputError, match="could not be uploaded") as caught:
        push_release(released.root, REPO)
    assert "hf_wrong" not in str(caught.value)


def test_private_unless_asked(hub: FakeHub, released: Released) -> None:
    push_release(released.root, REPO, public=True)
    assert not hub.private
    commits = list(hub.commits)
    with pytest.raises(BadInputError, match="everybody may read it"):
        push_release(released.root, REPO)
    assert list(hub.commits) == commits


def test_the_command_uploads_to_the_endpoint_of_the_environment(
    hub: FakeHub, released: Released
) -> None:
    environment = {
        **os.environ, "HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "rldecoder.cli", "export", "release", str(released.root), "--push",
         REPO],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "(private)" in done.stdout
    assert set(read_release(released.root).files) < set(hub.files)
    assert TOKEN not in done.stdout + done.stderr


def test_a_dry_run_asks_nobody(hub: FakeHub, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    plan = push_release(copied, REPO, dry_run=True)
    assert plan.commit is None
    assert plan.files == {
        path.relative_to(copied).as_posix(): path.stat().st_size
        for path in copied.rglob("*")
        if path.is_file()
    }
    (copied / "sae" / "stranger.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="never released"):
        push_release(copied, REPO, dry_run=True)
    assert hub.asked == []


def test_places_are_folders_or_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_place("ann/toy", None) == ("ann/toy", "main")
    assert hub_place("ann/toy@v1.0", None) == ("ann/toy", "v1.0")
    assert hub_place("ann/toy", "abc") == ("ann/toy", "abc")
    (tmp_path / "ann" / "toy").mkdir(parents=True)
    assert hub_place("ann/toy", None) is None  # what lies there goes first
    assert hub_place("/ann/toy/x", None) is None
    for place in ("./ann", "../up", "a/b/c", "one", "~/x"):
        assert hub_place(place, None) is None
    for place, revision in (("ann/a b", "main"), ("ann/other", "../up"), ("ann/toy", "main")):
        with pytest.raises(BadInputError):
            hub_place(place, revision)

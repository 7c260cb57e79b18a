"""Sources: order, the cache's links, pickles refused, and a hub that cannot be reached."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import GatedRepoError

from rldecoder.errors import BadInputError, DamagedFileError, NoResourceError
from rldecoder.lm.model_sources import (
    SourceUnavailableError,
    check_model_folder,
    copy_model_files,
    fetch,
    hub_errors,
    locate,
    locate_one,
)
from rldecoder.lm.specs import HfCacheSource, HubSource, LocalSource

REPO = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def fill_cache(cache: Path, model: Path) -> Path:
    """Lay `model` out as huggingface_hub does: blobs, and a snapshot of links to them."""
    repo = cache / ("models--" + REPO.replace("/", "--"))
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for index, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, repo / "blobs" / f"blob{index}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{index}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def silent(message: str) -> None:
    """A note that nobody reads."""


def test_local_folder_is_identified_by_content(tiny_lm_dir: Path, tmp_path: Path) -> None:
    here = locate_one(LocalSource(path=str(tiny_lm_dir)))
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_lm_dir, copy)
    assert locate_one(LocalSource(path=str(copy))).identity == here.identity
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert locate_one(LocalSource(path=str(copy))).identity != here.identity
    assert fetch(here, silent) == tiny_lm_dir


def test_cache_links_are_resolved(tiny_lm_dir: Path, hub_cache: Path, tmp_path: Path) -> None:
    fill_cache(hub_cache, tiny_lm_dir)
    by_branch = locate([HfCacheSource(repo=REPO)])
    by_commit = locate([HfCacheSource(repo=REPO, revision=COMMIT)])
    assert by_branch.identity == by_commit.identity == {"hub": f"{REPO}@{COMMIT}"}
    copy_model_files(fetch(by_branch, silent), tmp_path / "out")
    shutil.rmtree(hub_cache)
    for path in (tmp_path / "out").iterdir():
        assert not path.is_symlink()
        assert path.read_bytes() == (tiny_lm_dir / path.name).read_bytes()


def test_cache_of_another_revision_or_without_weights_is_passed_over(
    tiny_lm_dir: Path, hub_cache: Path
) -> None:
    with pytest.raises(SourceUnavailableError, match="not in the Hugging Face cache"):
        locate_one(HfCacheSource(repo=REPO))
    snapshot = fill_cache(hub_cache, tiny_lm_dir)
    with pytest.raises(SourceUnavailableError, match="no revision 'v2'"):
        locate_one(HfCacheSource(repo=REPO, revision="v2"))
    with pytest.raises(SourceUnavailableError, match="no complete"):
        locate_one(HfCacheSource(repo=REPO, revision="f" * 40))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(SourceUnavailableError, match="no complete"):
        locate_one(HfCacheSource(repo=REPO))


def test_broken_link_is_an_error(tiny_lm_dir: Path, hub_cache: Path) -> None:
    snapshot = fill_cache(hub_cache, tiny_lm_dir)
    (snapshot / "tokenizer.json").resolve().unlink()
    with pytest.raises(BadInputError, match=r"tokenizer\.json .* is a broken link"):
        locate([HfCacheSource(repo=REPO)])


def test_sources_are_tried_in_order(tiny_lm_dir: Path, hub_cache: Path, tmp_path: Path) -> None:
    fill_cache(hub_cache, tiny_lm_dir)
    absent = LocalSource(path=str(tmp_path / "absent"))
    present = LocalSource(path=str(tiny_lm_dir))
    assert locate([absent, HfCacheSource(repo=REPO), present]).source.kind == "hf_cache"
    assert locate([present, HfCacheSource(repo=REPO)]).source.kind == "local"


def test_when_nothing_is_found_every_reason_is_given(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sources = [
        LocalSource(path=str(tmp_path / "absent")),
        HfCacheSource(repo=REPO),
        HubSource(repo=REPO),
    ]
    with pytest.raises(BadInputError) as caught:
        locate(sources)
    for reason in ("no folder", "not in the Hugging Face cache", "HF_HUB_OFFLINE"):
        assert reason in str(caught.value)


def test_pickles_are_refused(tiny_lm_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInputError, match=r"pickles \(pytorch_model\.bin\)"):
        locate([LocalSource(path=str(folder))])
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(BadInputError, match="no safetensors weights"):
        locate([LocalSource(path=str(folder))])
    (folder / "config.json").unlink()
    with pytest.raises(BadInputError, match=r"no config\.json"):
        locate([LocalSource(path=str(folder))])


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_weights_are_files(tiny_lm_dir: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(tiny_lm_dir, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.unlink()
    if kind == "folder":
        weights.mkdir()
    elif kind == "pipe":
        os.mkfifo(weights)
    else:
        weights.symlink_to("/dev/zero")  # of which a copy would fill the disk
    with pytest.raises(BadInputError, match="is no file"):
        check_model_folder(folder)


def test_an_adapter_is_not_left_out_in_silence(tiny_lm_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_lm_dir, tmp_path / "model"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInputError, match="holds an adapter"):
        check_model_folder(folder)


def test_only_what_is_needed_is_copied(tiny_lm_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_dir, folder)
    for name in ("modeling_evil.py", "pytorch_model.bin", "optimizer.pt", "README.md"):
        (folder / name).write_text("x")
    copies = copy_model_files(folder, tmp_path / "out")
    assert {path.name for path in copies} == {path.name for path in tiny_lm_dir.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {p.name for p in copies}


def test_gpt2_files_get_the_names_that_transformers_reads(
    tiny_lm_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_dir, folder)
    (folder / "encoder.json").write_text("{}")
    (folder / "vocab.bpe").write_text("#version")
    copy_model_files(folder, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.json").read_text() == "{}"
    assert (tmp_path / "out" / "merges.txt").read_text() == "#version"


def test_missing_shards_are_named(tiny_lm_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_lm_dir, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )
    with pytest.raises(BadInputError, match=r"absent: model-2\.safetensors"):
        locate([LocalSource(path=str(folder))])
    index.write_text("[")
    with pytest.raises(DamagedFileError, match="cannot be read"):
        locate([LocalSource(path=str(folder))])


def test_too_little_disk_for_the_copy(
    tiny_lm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(NoResourceError, match="Copying the model needs"):
        copy_model_files(tiny_lm_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hub_resolves_a_branch_and_downloads_that_commit(
    tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Api:
        def model_info(self, repo: str, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(sha=COMMIT)

    def download(repo: str, **kwargs: Any) -> str:
        asked.append(kwargs)
        return str(tiny_lm_dir)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    located = locate([HubSource(repo=REPO)])
    assert located.identity == {"hub": f"{REPO}@{COMMIT}"}
    assert located.folder is None
    notes: list[str] = []
    assert fetch(located, notes.append) == tiny_lm_dir
    assert notes == [f"downloading {REPO} from the hub"]
    assert asked[0]["revision"] == COMMIT
    patterns = asked[0]["allow_patterns"]
    assert "model*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in patterns)


def test_hub_failures_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> None:
        class Api:
            def model_info(self, repo: str, **kwargs: Any) -> None:
                raise error

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    failing(GatedRepoError("gated", response=_response(403)))
    with pytest.raises(SourceUnavailableError, match="hf auth login"):
        locate_one(HubSource(repo=REPO))
    # A connection that fails raises the HTTP client's own error, here without any server.
    failing(hub_errors()[0]("Name or service not known"))
    with pytest.raises(SourceUnavailableError, match="Name or service not known"):
        locate_one(HubSource(repo=REPO))


def test_failed_download_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def model_info(self, repo: str, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(sha=COMMIT)

    def download(repo: str, **kwargs: Any) -> str:
        raise OSError("connection reset")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(BadInputError, match=r"could not be downloaded\. connection reset"):
        fetch(locate([HubSource(repo=REPO)]), silent)


def _response(status: int) -> Any:
    request = SimpleNamespace(url="https://hub", method="GET")
    return SimpleNamespace(
        status_code=status, headers={}, request=request, url="https://hub", text="", reason=""
    )

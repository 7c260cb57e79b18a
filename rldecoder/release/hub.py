"""Releases on the Hugging Face hub. A token is the environment's, and never a stored one."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from pydantic import TypeAdapter, ValidationError

from rldecoder.artifacts.manifests import MANIFEST
from rldecoder.config.base import HubRepo, Revision
from rldecoder.errors import BadInputError
from rldecoder.release.leaks import require_no_leaks
from rldecoder.release.manifest import ReleaseManifest, read_release, verify_release

TOKEN = "HF_TOKEN"
# Neither `./release` nor `../release`: they are folders, there or not.
_PLACE = re.compile(r"(?P<repo>[A-Za-z0-9_][^/@\s]*/[^/@\s]+)(?:@(?P<revision>\S+))?")
_TIMEOUT_SECONDS = 20.0
# The hub's error derives from its HTTP client's and from OSError; a failed connection raises the
# client's own, a bad name a ValueError, a large file that cannot be sent a RuntimeError.
_HUB_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,  # type: ignore[arg-type]
    OSError,
    ValueError,
    RuntimeError,
)


class Upload(NamedTuple):
    """What would be, or was, uploaded."""

    repo: str
    private: bool
    files: dict[str, int]
    """Sizes in bytes by name, the manifest included."""
    commit: str | None
    """Where it can be seen; None after a dry run."""


def hub_place(place: str, revision: str | None) -> tuple[str, str] | None:
    """The repository and revision that a place names, None where it names a folder.

    Raises:
        BadInputError: it is neither, or the revision is none.
    """
    match = _PLACE.fullmatch(place)
    if os.path.lexists(Path(place).expanduser()) or match is None:
        if revision is not None:
            raise BadInputError(
                f"{place} is a folder, which has no revisions.", "", "Leave the revision out."
            )
        return None
    return require_repo(match["repo"]), _revision(revision or match["revision"] or "main")


def require_repo(repo: str) -> str:
    """The name of a repository.

    Raises:
        BadInputError: no repository can have this name.
    """
    try:
        return TypeAdapter[str](HubRepo).validate_python(repo)
    except ValidationError:
        raise BadInputError(
            f"{repo!r} names no repository of the hub.", "", "Write it as owner/name."
        ) from None


def _revision(revision: str) -> str:
    try:
        return TypeAdapter[str](Revision).validate_python(revision)
    except ValidationError:
        raise BadInputError(
            f"{revision!r} is no revision.", "", "Give a commit, a branch or a tag."
        ) from None


def download_release(repo: str, revision: str, note: Callable[[str], None]) -> tuple[Path, Path]:
    """A release's folder in the hub's cache, and the folder that its files are links into.

    The manifest comes first, and then the files that it lists, whatever else lies there.

    Raises:
        BadInputError: there is none, or it cannot be reached.
        DamagedFileError: its manifest cannot be trusted.
    """

    def fetch(names: list[str], at: str) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=at,
                allow_patterns=names,
                token=os.environ.get(TOKEN) or False,
                etag_timeout=_TIMEOUT_SECONDS,
                endpoint=huggingface_hub.constants.ENDPOINT,
            )
        )

    try:
        root = fetch([MANIFEST], revision)
        cache = root.parent.parent
        manifest = read_release(root, links_into=cache)
        missing = [name for name in manifest.files if not (root / name).exists()]
        if missing:
            note(f"downloading {repo} from the hub")
            fetch(sorted(missing), root.name)  # of that commit, whatever has come since
    except _HUB_ERRORS as error:
        raise BadInputError(
            f"The release {repo} ({revision}) could not be downloaded.",
            _first_line(error),
            f"There is no such folder, so the hub was asked. Check the name and the network; a "
            f"private one needs its token in {TOKEN}.",
        ) from None
    return root, cache


def push_release(root: Path, repo: str, *, public: bool = False, dry_run: bool = False) -> Upload:
    """Upload a release as one commit; what lies there and is not in it, is removed.

    Args:
        root: the release's folder; it is verified first.
        repo: `owner/name`; made where it does not exist.
        public: everybody may read it. Otherwise a repository that they may is refused.
        dry_run: only say what would be uploaded; the hub is not asked anything.

    Raises:
        BadInputError: no token, no right to write, or a public repository that nobody asked for.
        DamagedFileError: the release is not what was written.
    """
    require_repo(repo)
    manifest = read_release(root)
    verify_release(root, manifest)
    require_no_leaks(root, [*manifest.files, MANIFEST])
    upload = Upload(repo, not public, _sizes(root, manifest), None)
    if dry_run:
        return upload

    token = os.environ.get(TOKEN)
    if not token:
        raise BadInputError(
            f"There is no token to upload to {repo} with.",
            f"It is read from {TOKEN} in the environment, and from nowhere else.",
            f"Make one that may write at huggingface.co/settings/tokens, and export {TOKEN}=...",
        )
    api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT, token=token)
    try:
        if not public:
            _refuse_public(api, repo)
        api.create_repo(repo, private=not public, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*commit a data file")  # they belong here
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=root,
                allow_patterns=sorted(upload.files),
                delete_patterns="*",
                commit_message=f"RL-Decoder release of {manifest.name}",
            )
    except _HUB_ERRORS as error:
        raise BadInputError(
            f"The release could not be uploaded to {repo}.",
            _first_line(error).replace(token, "***"),
            f"Check the name, the network, and that the token in {TOKEN} may write there.",
        ) from None
    return upload._replace(commit=str(commit.commit_url))


def _refuse_public(api: HfApi, repo: str) -> None:
    try:
        private = api.model_info(repo, timeout=_TIMEOUT_SECONDS).private
    except RepositoryNotFoundError:
        return  # it will be made
    if not private:
        raise BadInputError(
            f"{repo} is there already, and everybody may read it.",
            "Releases are private unless they are meant to be read by all.",
            "Add --public, or make the repository private.",
        )


def _sizes(root: Path, manifest: ReleaseManifest) -> dict[str, int]:
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    return {MANIFEST: (root / MANIFEST).stat().st_size} | sizes


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

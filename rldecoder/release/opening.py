"""Opening a release: whatever `Opened` offers, without the store of the run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rldecoder.artifacts.catalogue import CATALOGUE, ModelFolder
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.opened import EXPLAINING, A, Named, Opened, stage_name
from rldecoder.release.contents import (
    CORPUS,
    PIN,
    SETTINGS,
    ReleasedCorpus,
    Settings,
    folder_of,
)
from rldecoder.release.manifest import ReleaseManifest, read_release, verify_release
from rldecoder.reporting import Note

if TYPE_CHECKING:
    import torch

    from rldecoder.lm.frozen import FrozenLM

_log = logging.getLogger(__name__)


def open_release(
    place: Path | str,
    *,
    revision: str | None = None,
    model: Path | str | None = None,
    device: torch.device | str = "cpu",
    note: Note = _log.warning,
) -> Release:
    """Open a release: every file is compared with its hash before any is read.

    Args:
        place: its folder, or `owner/name` (also `owner/name@revision`) on the Hugging Face hub.
            A token for a private one is taken from HF_TOKEN, and from nowhere else.
        revision: a commit, branch or tag of the hub's repository; None: its main branch.
        model: the folder of the frozen model, where the release cannot know it; whatever it is
            called, it must be the very same model.
        device: where models go.
        note: told one line before something slow (a download) starts.

    Raises:
        BadInputError: there is no release, or it was written by a newer program.
        DamagedFileError: a file is not what was released.
    """
    root = Path(place).expanduser()
    links_into: Path | None = None
    if revision is not None or not os.path.lexists(root):
        from rldecoder.release.hub import download_release, hub_place

        found = hub_place(str(place), revision)
        if found is not None:
            root, links_into = download_release(*found, note)
    manifest = read_release(root, links_into=links_into)
    verify_release(root, manifest, links_into=links_into)
    return Release(root, manifest, device=device, model=model, note=note)


@dataclass(frozen=True)
class ReleasedModel(ModelFolder):
    """The frozen model of a release: its records are here, its files where the pin finds them."""

    given: Path | str | None = None
    """Where the caller says that they are."""
    note: Note = _log.warning

    @cached_property
    def model(self) -> Path:  # type: ignore[override]  # read as the `Plain` file of the base is
        """The model's folder, every file compared with the pin."""
        from rldecoder.lm.pins import ModelPin, find_model

        return find_model(ModelPin.load(self.folder.parent / PIN), self.note, self.given)

    def load(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> FrozenLM:
        """The frozen model; its token table is compared, too, from whatever file it came."""
        from rldecoder.lm.tokenizer_parity import require_vocabulary, vocabulary_sha256

        lm = super().load(device, dtype)
        found = vocabulary_sha256(lm.tokenizer)
        require_vocabulary(found, self.hashes.vocabulary_sha256, str(lm.folder))
        return lm


class Release(Opened):
    """A verified release; models and labels are loaded once, when asked for.

    Args:
        root: its folder.
        manifest: what has been verified.
        device, model, note: as in `open_release`.
    """

    def __init__(
        self,
        root: Path,
        manifest: ReleaseManifest,
        *,
        device: torch.device | str = "cpu",
        model: Path | str | None = None,
        note: Note = _log.warning,
    ) -> None:
        super().__init__(device)
        self.root, self.manifest = root, manifest
        self._model, self._note = model, note
        named = "" if model is None else f", model={str(Path(model).resolve())!a}"
        self.python = (f"run = rldecoder.open_release({str(root.resolve())!a}{named})",)
        missing = self.missing(EXPLAINING)
        if missing:
            raise DamagedFileError(
                f"{root} is no whole release.", f"It has no {', '.join(missing)}.", ""
            )

    def __repr__(self) -> str:
        return f"<Release {self.name}: {len(self.manifest.files)} files in {self.root}>"

    def _repr_html_(self) -> str:
        from rldecoder.dashboard.notebook import release_html

        released = [self.artifact(kind) for kind in CATALOGUE if kind.stage in self._released]
        return release_html(self.name, str(self.root), released)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.manifest.name

    @property
    def threads(self) -> int | None:
        """All cores: the machine of the run is not this one."""
        return None

    @property
    def reviews(self) -> Path:
        """A file where the program runs: a release is never written to."""
        from rldecoder.interp.review import REVIEWS_FILE

        return Path(REVIEWS_FILE)

    @property
    def sources(self) -> tuple[str, ...]:
        """As was released with it."""
        return tuple(source.name for source in ReleasedCorpus.load(self.root / CORPUS).sources)

    @cached_property
    def _released(self) -> frozenset[str]:
        """Stages of which there are files; of others the manifest has no more than the digest."""
        folders = {name.partition("/")[0] for name in self.manifest.files}
        artifacts = self.manifest.artifacts.items()
        return frozenset(stage for stage, one in artifacts if one.kind in folders)

    @cached_property
    def settings(self) -> Settings:
        """The settings that the released artifacts were built with."""
        return Settings.load(self.root / SETTINGS)

    def missing(self, which: Iterable[Named] | None = None) -> list[str]:
        """Names of the stages whose artifacts were not released.

        Args:
            which: those to ask about; None: all.
        """
        names = [kind.stage for kind in CATALOGUE] if which is None else map(stage_name, which)
        return [name for name in names if name not in self._released]

    def require(self, which: Iterable[Named] | None = None, purpose: str = "") -> None:
        """Refuse to go on without some artifacts.

        Args:
            which: the stages whose artifacts must be here; None: all.
            purpose: what they are needed for, such as `to explain`.

        Raises:
            BadInputError: one was not released.
        """
        missing = self.missing(which)
        if missing:
            raise BadInputError(
                f"The release {self.name} does not hold what is needed{purpose and f' {purpose}'}.",
                f"Missing in {self.root}: {', '.join(missing)}.",
                "Only the store of the run has it: `rldecoder.open_run(CONFIG, STORE)`.",
            )

    def _open(self, kind: type[A]) -> A:
        entry = self.manifest.artifacts[kind.stage]
        values: dict[str, Any] = {
            "folder": folder_of(kind, self.root),
            "digest": entry.digest,
            "metrics": entry.metrics,
            "config": self.settings.stages.get(kind.stage, {}),
            "verdict": entry.verdict,
            "caveats": entry.caveats,
        }
        if issubclass(ModelFolder, kind):
            opened = ReleasedModel(**values, given=self._model, note=self._note)
            assert isinstance(opened, kind)
            return opened
        return kind(**values)

"""Checkpoints of a stage that has not finished: safetensors and JSON, written atomically.

No pickle: a checkpoint is data that a later process reads back. Exact resume needs the weights,
the optimiser (`rldecoder.optimizer_state`) and the position in the data, which is the stage's own
JSON state; random numbers follow from the seed and the position.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder import files, interrupts, schemas, sealed
from rldecoder.errors import DamagedFileError
from rldecoder.reporting import Note

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)")
_TENSORS, _STATE, _SEAL = "tensors.safetensors", "state.json", "seal.json"
_FORMAT = 2
"""Raised when what states hold is laid out anew: earlier checkpoints are then passed over."""


class Checkpoint(NamedTuple):
    """What `Checkpoints.load` returns."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    beside: frozenset[str]
    """Names of the files outside the checkpoint that it goes with, all of them intact."""


class Checkpoints:
    """The checkpoints in one folder, newest last.

    A checkpoint is a folder `step-000000123` that appears by rename, so that a kill in the
    middle of a save leaves the previous one in force. Its `seal.json`, written last, has the
    SHA-256 of its files and of those beside it, its step and its owner.

    Args:
        folder: made if need be.
        owner: whose they are; another's are not loaded.
        note: told of each that is passed over.
    """

    def __init__(
        self, folder: Path, keep: int = 2, *, owner: str = "", note: Note = _log.warning
    ) -> None:
        self.folder, self.keep, self.note = folder, keep, note
        self.owner = f"{owner} (format {_FORMAT})"
        self._hashed: dict[Path, tuple[tuple[int, ...], str]] = {}

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        beside: Sequence[Path] = (),
    ) -> None:
        """Save atomically and drop all but the newest `keep` checkpoints.

        Args:
            beside: files and folders that a resumed run will use as they are now.

        Raises:
            KeyboardInterrupt: the process was asked to stop before; the last one stays in force.
        """
        interrupts.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"writing-{step:09d}"
        files.remove(aside)
        aside.mkdir()
        # Storage may be shared (tied weights, views); safetensors wants owned, contiguous data.
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(plain, aside / _TENSORS)
        files.fsync(aside / _TENSORS)
        schemas.write_json(aside / _STATE, {"step": step, "state": state})
        seal = {
            "step": step,
            "files": {name: files.hash_file(aside / name) for name in (_TENSORS, _STATE)},
            "beside": self._hashes(beside),
        }
        sealed.write(aside / _SEAL, seal, owner=self.owner)
        files.fsync(aside)
        final = self.folder / f"step-{step:09d}"
        files.remove(final)
        aside.rename(final)
        files.fsync(self.folder)
        # Later ones can only be such as were passed over; they must not push this one out.
        steps = sorted(_step(folder) for folder in self._folders() if _step(folder) <= step)
        for folder in self._folders():
            if _step(folder) not in steps[-self.keep :]:
                files.remove(folder)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None when there is none."""
        for folder in reversed(self._folders()):
            try:
                return self._load(folder)
            except (DamagedFileError, OSError, SafetensorError) as error:
                # An older checkpoint only costs time; a damaged one must not stop the run.
                why = error.why if isinstance(error, DamagedFileError) else str(error)
                self.note(f"Checkpoint {folder} is passed over: {why}")
        return None

    def clear(self) -> None:
        """Remove every checkpoint."""
        files.remove(self.folder)

    def _load(self, folder: Path) -> Checkpoint:
        seal = sealed.read(folder / _SEAL, owner=self.owner)
        changed = sealed.first_changed(folder, seal["files"])
        changed = changed or sealed.first_changed(self.folder.parent, seal["beside"])
        if changed or seal["step"] != _step(folder):
            raise DamagedFileError("", f"{changed or 'it is of another step'}.")
        state = schemas.read_json(folder / _STATE)["state"]
        tensors = load_file(folder / _TENSORS)
        return Checkpoint(seal["step"], tensors, state, frozenset(seal["beside"]))

    def _hashes(self, beside: Sequence[Path]) -> dict[str, str]:
        """As `sealed.hashes`; what was not changed since the last save is not read again."""
        out = {}
        for file in sealed.walk(beside):
            stat = file.lstat()
            mark = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
            if self._hashed.get(file, (None, ""))[0] != mark:
                self._hashed[file] = mark, files.hash_file(file)
            out[file.relative_to(self.folder.parent).as_posix()] = self._hashed[file][1]
        return out

    def _folders(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((f for f in found if f.is_dir() and _NAME.fullmatch(f.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))

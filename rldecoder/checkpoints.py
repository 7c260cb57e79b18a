"""Checkpoints of a stage that has not finished: safetensors and JSON, written atomically.

No pickle: a checkpoint is data that a later process reads back. Exact resume needs the weights,
the optimiser, every random generator and the position in the data; the helpers below turn the
first three into named tensors, and the position is the stage's own JSON state.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder import interrupts, schemas
from rldecoder.errors import DamagedFileError


class Checkpoint(NamedTuple):
    """What `Checkpoints.load` returns."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder, newest last.

    A checkpoint is a folder `step-000000123` that appears by rename, so that a kill in the
    middle of a save leaves the previous one in force.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Save atomically and drop all but the newest `keep` checkpoints.

        Raises:
            KeyboardInterrupt: the process was asked to stop before; the last one stays in force.
        """
        interrupts.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f"writing-{step:09d}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        # Storage may be shared (tied weights, views); safetensors wants owned, contiguous data.
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(plain, aside / "tensors.safetensors")
        schemas.write_json(aside / "state.json", {"step": step, "state": state})
        _fsync(aside / "tensors.safetensors")
        _fsync(aside)
        final = self.folder / f"step-{step:09d}"
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _fsync(self.folder)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None when there is none."""
        for folder in reversed(self._folders()):
            try:
                header = schemas.read_json(folder / "state.json")
                tensors = load_file(folder / "tensors.safetensors")
            except (DamagedFileError, OSError, SafetensorError) as error:
                # An older checkpoint only costs time; a damaged one must not stop the run.
                print(f"checkpoint {folder} is damaged and is passed over: {error}")
                continue
            return Checkpoint(int(header["step"]), tensors, header["state"])
        return None

    def clear(self) -> None:
        """Remove every checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors (`optimizer.<param>.<key>`) and JSON values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {"groups": [], "values": {}}
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain["values"].setdefault(str(index), {})[key] = value
    for group in state["param_groups"]:
        plain["groups"].append(dict(group))
    return tensors, plain


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    """The inverse of `pack_optimizer`, in place."""
    entries: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = tensor
    for index_text, values in state["values"].items():
        entries.setdefault(int(index_text), {}).update(values)
    groups = []
    for group in state["groups"]:
        # JSON has no tuples, and torch compares betas by unpacking: restore the type.
        groups.append({k: tuple(v) if k == "betas" else v for k, v in group.items()})
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def pack_rng() -> dict[str, Tensor]:
    """The global generators of torch (CPU and CUDA), NumPy and Python as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, python_state, next_gauss = random.getstate()
    out = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "rng.numpy_rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "rng.python": torch.tensor([version, *python_state], dtype=torch.int64),
        "rng.python_gauss": torch.tensor(
            [float("nan") if next_gauss is None else next_gauss], dtype=torch.float64
        ),
    }
    for index in range(torch.cuda.device_count()):
        out[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return out


def unpack_rng(tensors: dict[str, Tensor]) -> None:
    """Restore what `pack_rng` saved."""
    torch.set_rng_state(tensors["rng.torch"])
    position, has_gauss, gauss = tensors["rng.numpy_rest"].tolist()
    keys = tensors["rng.numpy_keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    version, *python_state = tensors["rng.python"].tolist()
    next_gauss = float(tensors["rng.python_gauss"][0])
    random.setstate(
        (version, tuple(python_state), None if next_gauss != next_gauss else next_gauss)
    )
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

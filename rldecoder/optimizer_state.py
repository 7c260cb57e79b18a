"""An optimiser's state as named tensors and JSON values, for checkpoints without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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

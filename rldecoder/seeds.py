"""One seed in; each stage derives its own, so that reordering stages changes nothing."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 31-bit seed that depends on `seed` and `names` only.

    Hashing keeps streams of different stages (or epochs, rollouts, ...) unrelated, which
    `seed + i` would not.
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices) for code that reads global generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (third-party code reads the legacy global)
    torch.manual_seed(seed)


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator seeded with `derive_seed(seed, *names)`."""
    import torch

    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, *names))
    return generator

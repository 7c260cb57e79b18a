"""One seed in, unrelated and stable seeds out."""

from __future__ import annotations

import random

import numpy as np
import torch

from rldecoder.seeds import derive_seed, seed_everything, torch_generator


def test_derived_seeds_are_stable_and_distinct() -> None:
    assert derive_seed(0, "train_sae") == 613_222_649
    names = [("a", "b"), ("ab",), ("a", 1), ("a", 2), ("b", "a")]
    assert len({derive_seed(seed, *name) for seed in range(20) for name in names}) == 100


def test_generators_repeat() -> None:
    first = torch.rand(3, generator=torch_generator(1, "x"))
    assert torch.equal(first, torch.rand(3, generator=torch_generator(1, "x")))
    assert not torch.equal(first, torch.rand(3, generator=torch_generator(1, "y")))


def test_seed_everything_reaches_all_globals() -> None:
    def draw() -> tuple[float, float, float]:
        seed_everything(5)
        return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()

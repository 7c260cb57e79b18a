"""Figures are the same bytes on every run."""

from __future__ import annotations

from pathlib import Path

import torch

from rldecoder.sae.plots import density_histogram


def test_density_histogram_is_reproducible(tmp_path: Path) -> None:
    density = torch.tensor([0.0, 0.0, 0.01, 0.1, 0.5], dtype=torch.float64)
    for name in ("a", "b"):
        density_histogram(density, density / 2, tmp_path / f"{name}.svg")
    first = (tmp_path / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    assert first.startswith(b"<?xml")

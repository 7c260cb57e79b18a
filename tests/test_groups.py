"""Tests of one file run in one worker: their set-ups are built once."""

from __future__ import annotations

import pytest


def test_a_file_is_a_group(request: pytest.FixtureRequest, worker_id: str) -> None:
    """pytest-xdist writes the group behind the name; some pytest versions lose it silently."""
    if worker_id == "master" or not request.config.getoption("loadgroup", False):
        pytest.skip("not under `--dist loadgroup`")
    assert request.node.nodeid.endswith("@test_groups.py")

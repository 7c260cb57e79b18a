"""Whether Python collects again when a program has started."""

from __future__ import annotations

import gc

import pytest

from rldecoder.cli.collection import no_collection


def test_it_collects_again_whatever_happened_at_the_start() -> None:
    def failing() -> None:
        with no_collection():
            assert not gc.isenabled()
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        failing()
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

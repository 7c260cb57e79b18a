"""No garbage collection while a program starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """While open, Python looks for no cycles of references.

    What is imported and loaded at a start stays, and every look walks over all of it: 1.5 of the 11
    CPU seconds of `rldecoder explain`.
    """
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()

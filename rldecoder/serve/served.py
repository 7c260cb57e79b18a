"""What a server serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rldecoder.interp.contexts import LatentContexts
from rldecoder.serve.catalogue import Catalogue
from rldecoder.serve.code import Code
from rldecoder.serve.pages import PageFacts
from rldecoder.serve.workbench import Workbench


class Served(NamedTuple):
    """Everything that answers, and what stands on the page."""

    workbench: Workbench
    catalogue: Catalogue
    facts: PageFacts
    report: bytes | None
    """`report.html` of the run as it was published, where it is."""
    texts: Callable[[int, int], LatentContexts]
    """Where a latent fires in unseen text, and how many places are wanted (`Opened.contexts`)."""
    code: Code

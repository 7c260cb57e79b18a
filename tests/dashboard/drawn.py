"""What is in a drawing, read back from its SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from rldecoder.dashboard.architecture import Sizes
from rldecoder.dashboard.figures import (
    PALETTE,
    Drawing,
)

SIZES = Sizes("smollm2-135m", 24, 30, 576, 5760, "64", 2)


def texts(drawn: Drawing) -> list[str]:
    return [
        node.text or "" for node in ET.fromstring(drawn.svg).iter() if node.tag.endswith("}text")
    ]


def strokes(drawn: Drawing) -> list[tuple[str, str]]:
    """Colour and dashes of every line of a plot, in the order of drawing; no axes, no legend."""
    found = []
    for group in ET.fromstring(drawn.svg).iter():
        if group.get("id", "").startswith("line2d"):
            for path in group:
                style = dict(
                    part.split(": ") for part in path.get("style", "").split("; ") if ": " in part
                )
                if path.tag.endswith("path") and style.get("stroke") in PALETTE:
                    found.append((style["stroke"], style.get("stroke-dasharray", "solid")))
    return found

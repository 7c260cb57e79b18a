"""URLs as they may be shown."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")


def without_credentials(url: str) -> str:
    """The URL without user name and password; anything else unchanged."""
    return _USER_INFO.sub("", url)

"""Credentials in URLs: used for the connection, and never shown."""

from __future__ import annotations

import re

# A URL in any text, chained ones (`simplecache::s3://...`) included. Quotes and brackets end it.
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<rest>[^\s\"'<>`]*)")
_ONE_URL = re.compile(r"(?P<scheme>(?:[A-Za-z][\w+.-]*::)*[A-Za-z][\w+.-]*://)(?P<rest>[^\r\n\t]*)")
_HIDDEN = "***"


def without_credentials(text: str, *known: str) -> str:
    """A text in which every URL has lost its user, password, query and fragment.

    Queries go too, for signed URLs carry their key there; `***` marks what was left out.

    Args:
        text: an error's text, or one URL.
        known: URLs that the text may hold, whatever characters are in their passwords.
    """
    for url in (*known, text):
        whole = _ONE_URL.fullmatch(url)
        if whole:
            text = text.replace(url, whole["scheme"] + _bare(whole["rest"]))
    return _URL.sub(lambda match: match["scheme"] + _bare(match["rest"]), text)


def _bare(rest: str) -> str:
    """`user:password@host/path?query` without what is secret."""
    first, chain, others = rest.partition("::")  # fsspec's chains, such as `a://b::c://d`
    # The last @ ends a password that was not percent-encoded, too.
    netloc = re.split(r"[/?#]", first, maxsplit=1)[0]
    if "@" in first and ("@" in netloc or ":" in netloc):
        first = f"{_HIDDEN}@{first.rpartition('@')[2]}"
    path, mark, _ = re.split(r"([?#])", f"{first}?", maxsplit=1)
    shown = path + mark + _HIDDEN if len(path) < len(first) else path
    return shown + chain + (without_credentials(others) if chain else "")

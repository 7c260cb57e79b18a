"""The password of this machine's Prefect server: made once, kept where only its user can read it.

Whoever holds it may do all that the server offers. It is in no command line and in no log: the
server and the worker get it through their environment, the browser in exchange for a one-time
code, `rldecoder run` and the `prefect` command from the file.

Nothing here imports Prefect, whose settings are read when it is imported.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import stat
from pathlib import Path

from rldecoder.errors import BadInputError

PASSWORD_FILE = "ui-password"
"""In the Prefect home."""

_LONGEST = 1024


def password_of(home: Path) -> str:
    """The password of a home's server; it is made if there is none.

    Raises:
        BadInputError: the file is not a private file of this user, or is empty.
    """
    path = home / PASSWORD_FILE
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Written aside and linked into place: nobody ever reads half of it, and the first one wins.
    aside = home / f".{PASSWORD_FILE}.{secrets.token_hex(8)}"
    if not path.is_file():
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(aside)
        finally:
            aside.unlink()
    return _read(path)


def authorization(password: str) -> str:
    """The header that carries the password."""
    return "Basic " + base64.b64encode(password.encode()).decode()


def _read(path: Path) -> str:
    mend = "Delete it, and start `make ui` again: another one is made."
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BadInputError(
            f"The password file {path} cannot be read.", str(error), mend
        ) from error
    try:
        about = os.fstat(fd)
        private = stat.S_ISREG(about.st_mode) and not about.st_mode & 0o077
        if not private or about.st_uid != os.getuid():
            raise BadInputError(
                f"The password file {path} is not a private file of yours.",
                "Others may know what is in it.",
                mend,
            )
        text = os.read(fd, _LONGEST).decode("ascii", errors="replace").strip()
    finally:
        os.close(fd)
    if not text or not text.isprintable() or not text.isascii():
        raise BadInputError(f"The password file {path} holds no password.", "", mend)
    return text

"""Reading files that a user has named: nothing that waits, never ends, or fills the memory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rldecoder.errors import BadInputError

MAX_BYTES = 64 << 20


def read_text(path: Path, mend: str) -> str:
    """The text of a regular file, UTF-8 with or without a byte order mark.

    Args:
        mend: what the user should name instead.

    Raises:
        BadInputError: there is none, it is a folder, pipe or device, too large, or no such text.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits until someone writes to it.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise BadInputError(f"{path} cannot be read.", "It is no regular file.", mend)
            if found.st_size > MAX_BYTES:
                raise BadInputError(
                    f"{path} cannot be read.", f"It is larger than {MAX_BYTES >> 20} MiB.", mend
                )
            return file.read(MAX_BYTES).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path} cannot be read.", f"Byte {error.start:,} is not UTF-8.", mend
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadInputError(f"{path} cannot be read.", str(error), mend) from error

"""The database behind `make ui`: SQLite in the Prefect home, or a PostgreSQL server.

The URL comes by an environment variable and leaves it at once: a command line is everybody's to
read (`ps`), and flow runs, which inherit the environment, have no business with the password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from urllib.parse import unquote, urlsplit

from rldecoder.errors import BadInputError

DATABASE_ENV = "RLDECODER_DATABASE"
"""What `make ui DATABASE=...` sets."""
PREFECT_ENV = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
"""What Prefect's server reads."""
_PREFIX = "postgresql+asyncpg://"
_SECRETS = re.compile(r"^PREFECT_(SERVER|API)_DATABASE_")


def take_database(env: MutableMapping[str, str] = os.environ) -> str | None:
    """The database's URL, taken out of an environment; None for SQLite in the home.

    Raises:
        BadInputError: it is of another kind of database; it is not quoted, for it holds a password.
    """
    url = env.pop(DATABASE_ENV, "").strip()
    for name in [name for name in env if _SECRETS.match(name)]:
        del env[name]
    if not url:
        return None
    parts = urlsplit(url) if url.startswith(_PREFIX) else None
    if parts is None or not parts.path.strip("/"):
        raise BadInputError(
            "The DATABASE is none that `make ui` knows.",
            "It does not begin with postgresql+asyncpg://, or names no database.",
            "Example: make ui DATABASE=postgresql+asyncpg://USER@HOST:5432/prefect, with the "
            "password in PGPASSWORD or ~/.pgpass.",
        )
    return url


def for_clients(env: Mapping[str, str], url: str | None) -> dict[str, str]:
    """The environment of the worker and its runs: they ask the server, and never its database."""
    return {name: value for name, value in env.items() if url is None or name != "PGPASSWORD"}


def without_password(text: str, url: str | None) -> str:
    """A server's words without the password of its database."""
    password = urlsplit(url).password if url else None
    for secret in {password, unquote(password)} if password else ():
        text = text.replace(secret, "***")
    return text

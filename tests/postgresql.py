"""A PostgreSQL server for tests, where Debian's is installed: its own folder, port and password."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.local_server import free_port

REQUIRE = "RLDECODER_REQUIRE_POSTGRESQL"
PASSWORD = "hunter2-and-more"


def programs() -> Path | None:
    """Where `initdb` and `pg_ctl` are; Debian keeps them off the PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    found = [place for place in places if (place / "initdb").is_file()]
    if found:
        return found[-1]
    here = shutil.which("initdb")
    return Path(here).parent if here else None


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of an empty database, with its password in it.

    Skips where there is no PostgreSQL, unless RLDECODER_REQUIRE_POSTGRESQL says there must be.
    """
    bin_folder = programs()
    if bin_folder is None:
        if os.environ.get(REQUIRE):
            pytest.fail(f"{REQUIRE} is set, and there is no PostgreSQL (apt install postgresql)")
        pytest.skip("there is no PostgreSQL here (apt install postgresql)")
    # It refuses to run as root; a folder of pytest's is closed to other users.
    user = pwd.getpwnam("postgres") if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="rldecoder-pg-"))
    port = free_port()
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)

    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=240,
            user=None if user is None else user.pw_uid,
            group=None if user is None else user.pw_gid,
        )  # fmt: skip
        log = folder / "log"
        assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")

    try:
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        run(str(bin_folder / "initdb"), "-D", str(folder / "data"), "-U", "prefect", "--no-sync",
            "-A", "scram-sha-256", "--pwfile", str(secret))  # fmt: skip
        settings = f"-c listen_addresses=127.0.0.1 -p {port} -c fsync=off -k {folder}"
        run(str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-l", str(folder / "log"),
            "-w", "-t", "200", "-o", settings, "start")  # fmt: skip
        try:
            yield f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run(str(bin_folder / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)

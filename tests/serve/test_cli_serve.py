"""The command: starts, answers, stops on Ctrl-C; refuses to let other machines in unasked."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from rldecoder import open_run
from rldecoder.artifacts.catalogue import Report
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.cli.serve import allowed_hosts, listen
from rldecoder.errors import BadInputError
from tests.conftest import ROOT
from tests.forked import ForkServer


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_machines_are_let_in_only_on_request(host: str) -> None:
    with pytest.raises(BadInputError, match="--allow-remote"):
        allowed_hosts(host, False, [])
    names = allowed_hosts(host, True, ["box.lan"])
    assert "box.lan" in names
    assert (f"[{host}]" if ":" in host else host) in names


def test_loopback_needs_no_permission() -> None:
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        assert "127.0.0.1" in allowed_hosts(host, False, [])
    with pytest.raises(BadInputError, match="--host-name is for servers"):
        allowed_hosts("127.0.0.1", False, ["evil.example"])


def test_a_port_in_use_is_said_so() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(BadInputError, match="choose another --port"):
            listen("127.0.0.1", other.getsockname()[1])
    with pytest.raises(BadInputError, match="cannot listen on 203"):
        listen("203.0.113.1", 0)


def test_the_command_says_what_is_missing_before_it_loads(
    forks: ForkServer, tmp_path: Path
) -> None:
    for extra, message in (
        (["--store", str(tmp_path)], "has not come far enough to explain"),
        (["--host", "0.0.0.0"], "let other machines in"),
    ):
        result = forks.run("serve", "configs/debug.yaml", "--port", "0", *extra)
        assert result.returncode == 2
        assert message in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


def test_a_report_is_served_only_as_it_was_published(debug_store: Path, tmp_path: Path) -> None:
    run = open_run(ROOT / "configs" / "debug.yaml", tmp_path)
    ref = run.refs[Report.stage]
    said: list[str] = []
    assert run.report(said.append) is None
    assert said == []  # there is none yet
    shutil.copytree(ArtifactStore(debug_store).path(ref), run.store.path(ref))
    page = Report.page.path(run.store.path(ref))
    published, before = page.read_bytes(), page.stat()
    assert run.report(said.append) == published
    run.store.verify(ref)
    # As long and as old as what this store has verified already.
    page.write_bytes(published.replace(b"Targets", b"targets", 1))
    os.utime(page, ns=(before.st_atime_ns, before.st_mtime_ns))
    for opened in (run, open_run(run.config, tmp_path)):
        said.clear()
        assert opened.report(said.append) is None
        assert "The report is not served" in said[0]


@pytest.mark.slow
def test_the_command_serves_until_interrupted(debug_store: Path, tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "rldecoder.cli", "serve", "configs/debug.yaml", "--store",
         str(debug_store), "--port", "0", "--reviews", str(tmp_path / "r.jsonl")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline(), server.stdout.readline()]
        found = re.search(r"http://127\.0\.0\.1:\d+/", lines[1])
        assert found, lines
        url = found[0]
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            page = client.get("/")
            token = re.search(r'name="rldecoder-token" content="([^"]+)"', page.text)
            assert token
            answer = client.post(
                "/api/trace", json={"prompt": "a b c"},
                headers={"origin": url.rstrip("/"), "x-rldecoder-token": token[1]},
            )  # fmt: skip
            assert answer.status_code == 200
            report = client.get("/report")
            assert report.status_code == 200
            assert "Targets of the original plan" in report.text
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
        assert server.returncode == 0, err
        assert "stopped" in out
        assert "Traceback" not in err
    finally:
        server.kill()
        server.communicate()

"""Who owns the Prefect home, and where its server is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows import local_server
from flows.local_server import owned, server_for_one_run, shared_url
from rldecoder.errors import BadInputError, NoResourceError
from tests.flows.ui_client import Ui

OWNER = """
import sys, time
from pathlib import Path
from flows.local_server import owned
with owned(Path(sys.argv[1])) as offer:
    offer("http://127.0.0.1:9/api")
    print("owned", flush=True)
    time.sleep(60)
"""


def test_a_home_has_one_owner(tmp_path: Path) -> None:
    with owned(tmp_path) as first, owned(tmp_path) as second:
        assert first is not None
        assert second is None
    with owned(tmp_path) as again:
        assert again is not None


def test_only_an_address_that_answers_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared_url(tmp_path) is None
    with owned(tmp_path) as offer:
        assert shared_url(tmp_path) is None
        assert offer is not None
        offer("http://127.0.0.1:9/api")
        assert shared_url(tmp_path) is None
        monkeypatch.setattr(local_server, "answers", lambda url: True)
        assert shared_url(tmp_path) == "http://127.0.0.1:9/api"
    assert shared_url(tmp_path) is None


def test_kill_9_of_the_owner_frees_the_home(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    assert owner.stdout.readline() == "owned\n"
    with owned(tmp_path) as offer:
        assert offer is None
    owner.kill()
    owner.communicate()
    with owned(tmp_path) as offer:
        assert offer is not None
    assert shared_url(tmp_path) is None


def test_an_address_that_does_not_answer_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with (
        pytest.raises(BadInputError, match="--no-prefect"),
        server_for_one_run(tmp_path, pytest.fail),
    ):
        pass


def test_a_server_that_ends_at_once_shows_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        pid = 0

        def poll(self) -> int:
            return 1

        def wait(self, timeout: float | None = None) -> int:
            return 1

    def start(*arguments: object, **named: object) -> Dead:
        named["stdout"].write(b"no such table")  # type: ignore[attr-defined]
        return Dead()

    monkeypatch.setattr(local_server.tied, "start", start)
    monkeypatch.setattr(local_server.tied, "stop", lambda process: None)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with (
        pytest.raises(NoResourceError, match=r"ended at once.*no such table.*--no-prefect"),
        server_for_one_run(tmp_path, lambda: None),
    ):
        pass


@pytest.mark.slow
def test_a_run_joins_the_ui_that_is_there(ui: Ui) -> None:
    with server_for_one_run(ui.home, lambda: None) as server:
        assert server == (ui.url, ui.password)

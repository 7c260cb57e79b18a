"""An S3 server for the whole session, and a bucket of its own for each test."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rldecoder.artifacts.remote import RemoteStore
from rldecoder.config.store import S3Config
from tests.artifacts.s3_server import KEY, SECRET, Proxy

Opener = Callable[..., RemoteStore]


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A way to the server that can be made to fail; the environment points there."""
    found = Proxy(s3_port)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", found.url)
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def bucket(proxy: Proxy) -> str:
    """The URL of a new prefix in a new bucket."""
    import boto3

    name = f"rldecoder-{uuid.uuid4().hex[:12]}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/some/prefix"


@pytest.fixture
def machine(bucket: str, tmp_path: Path) -> Opener:
    """Opens the store as on a machine of that name: with a cache of its own."""

    def opened(name: str, **settings: object) -> RemoteStore:
        values = {"cache": tmp_path / name, "lease_seconds": 60.0, **settings}
        return RemoteStore(bucket, S3Config.model_validate(values))

    return opened

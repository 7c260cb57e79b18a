"""A server on the debug run: its application, a client, and hostile labels."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from rldecoder import open_run
from rldecoder.artifacts.catalogue import Clusters, Labels
from rldecoder.cli.serve import listen, open_served
from rldecoder.explain.inputs import LabelText
from rldecoder.serve.app import make_app
from rldecoder.serve.catalogue import Catalogue
from rldecoder.serve.served import Served
from rldecoder.serve.server import make_server
from rldecoder.serve.workbench import Workbench
from tests.conftest import ROOT
from tests.stages.published import published

TOKEN = "test-token"
HOST = "127.0.0.1:8760"
PROMPT = "The import statement finds a module and then"
HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\u200b\x1b[2J{{7*7}}<!--"
LONG = "W" * 10_000


@pytest.fixture(scope="session")
def served(debug_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """What `rldecoder serve configs/debug.yaml` would serve."""
    run = open_run(ROOT / "configs" / "debug.yaml", debug_store)
    reviews = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    return open_served(run, max_tokens=64, reviews=reviews)


def catalogue_of(labels: Path, clusters: Path, reviews: Path) -> Catalogue:
    """The catalogue of artifacts in these folders."""
    return Catalogue(published(Labels, labels), published(Clusters, clusters), reviews)


@pytest.fixture
def own_reviews(served: Served, debug_labels: Path, debug_clusters: Path, tmp_path: Path) -> Served:
    """The same with a file of verdicts for this test alone."""
    return served._replace(
        catalogue=catalogue_of(debug_labels, debug_clusters, tmp_path / "reviews.jsonl")
    )


@pytest.fixture(scope="session")
def debug_labels(debug_store: Path) -> Path:
    """The `label_features` artifact of the debug run."""
    (folder,) = (debug_store / "label_features").glob("*/feature_labels.json")
    return folder.parent


@pytest.fixture(scope="session")
def debug_clusters(debug_store: Path) -> Path:
    """The `cluster_features` artifact of the debug run."""
    (file,) = (debug_store / "cluster_features").glob("*/review_queue.json")
    return file.parent


@pytest.fixture
def client(own_reviews: Served) -> TestClient:
    """A client that sends what the page sends."""
    return client_of(own_reviews)


def client_of(served: Served, **options: Any) -> TestClient:
    headers = {"origin": f"http://{HOST}", "x-rldecoder-token": TOKEN}
    app = make_app(served, token=TOKEN, **options)
    return TestClient(
        app, base_url=f"http://{HOST}", headers=headers, raise_server_exceptions=False
    )


@pytest.fixture
def hostile(served: Served, debug_labels: Path, debug_clusters: Path, tmp_path: Path) -> Served:
    """The debug run, every text of its labels replaced by something that wants to act."""
    folder = tmp_path / "labels"
    shutil.copytree(debug_labels, folder)
    file = folder / "feature_labels.json"
    labels = json.loads(file.read_text(encoding="utf-8"))
    for number, feature in enumerate(labels["features"]):
        if feature["label"] is not None:
            feature["label"] = HOSTILE
        else:
            feature["failure"] = HOSTILE
        for example in feature["examples"] + feature["contrasts"]:
            example["tokens"] = [LONG if number % 2 else HOSTILE for _ in example["tokens"]]
        feature["other_labels"] = [
            {"labeler": HOSTILE, "model": HOSTILE, "judge": HOSTILE, "judge_trusted": False,
             "confidence": None, "no_confidence": HOSTILE,
             "label": None if number % 2 else HOSTILE, "failure": HOSTILE if number % 2 else None,
             "scores": {"detection": 0.5, "fuzzing": None, "window_precision": 0.25,
                        "questions": 2, "failures": 1}}
        ]  # fmt: skip
        for effect in feature["promoted"] + feature["suppressed"]:
            effect["token"] = HOSTILE
        said = {"reviewer": HOSTILE, "accept": True, "label": HOSTILE, "note": HOSTILE}
        feature["reviews"] = [said | {"shown": "other", "at": HOSTILE}] if number == 0 else []
    file.write_text(json.dumps(labels), encoding="utf-8")
    reader = served.workbench.reader
    texts = {
        latent: LabelText(HOSTILE, 0.5, latent % 2 == 0) for latent in range(reader.sae.num_latents)
    }
    bench = Workbench(replace(reader, labels=texts), max_tokens=64)
    facts = served.facts._replace(
        run_name=HOSTILE, caveats=[HOSTILE], about=(HOSTILE, HOSTILE), examples=(HOSTILE,)
    )
    catalogue = catalogue_of(folder, debug_clusters, tmp_path / "reviews.jsonl")
    return served._replace(workbench=bench, catalogue=catalogue, facts=facts)


class Running:
    """A server in a thread, on a free port."""

    def __init__(self, served: Served) -> None:
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.reviews = served.catalogue.reviews
        self.app = make_app(served)
        self.port = int(self.socket.getsockname()[1])
        self._server = make_server(self.app)
        self._thread = threading.Thread(target=self._server.run, args=([self.socket],))

    def __enter__(self) -> Running:
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.05)
        assert httpx.get(self.url, trust_env=False).status_code == 200
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        self.socket.close()


@pytest.fixture
def running(own_reviews: Served) -> Iterator[Running]:
    """The debug run, served."""
    with Running(own_reviews) as server:
        yield server


@pytest.fixture
def running_hostile(hostile: Served) -> Iterator[Running]:
    """The debug run with hostile labels, served."""
    with Running(hostile) as server:
        yield server

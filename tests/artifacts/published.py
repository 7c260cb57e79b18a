"""An artifact as the runner would publish it, for tests of stores and of manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rldecoder.artifacts.store import (
    ArtifactRef,
    ArtifactStore,
    Manifest,
    artifact_digest,
)

FIELDS = {"size": 3}


ORIGIN: dict[str, Any] = {"version": 1, "seed": 1, "inputs": {}, "fingerprint": {"text": "a"}}


REF = ArtifactRef(
    kind="tokens",
    stage="ingest",
    digest=artifact_digest(stage="ingest", config=FIELDS, **ORIGIN),
)


def manifest(ref: ArtifactRef = REF, **changes: Any) -> Manifest:
    """A manifest as the runner would hand it in: no files yet."""
    values: dict[str, Any] = {
        "kind": ref.kind, "stage": ref.stage, "digest": ref.digest, **ORIGIN,
        "config": {**FIELDS, "workers": 1}, "digest_fields": FIELDS, "files": {},
        "metrics": {"n": 1}, "source_digest": "s", "git_commit": None, "packages": {},
        "device": "cpu", "device_name": "cpu", "threads": 1, "wall_seconds": 0.0,
        "peak_memory_bytes": 0, "resumed": False, "created_at": "2026-01-01", "verdict": "fail",
    }  # fmt: skip
    return Manifest(**(values | changes))


def publish(store: ArtifactStore, content: bytes = b"hello") -> Path:
    """Publish one artifact with one file in a subfolder."""
    with store.building(REF) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file.bin").write_bytes(content)
        store.publish(REF, folder, manifest())
    return store.path(REF) / "sub" / "file.bin"


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a manifest as a person with an editor would."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2, sort_keys=True))

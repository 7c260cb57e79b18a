"""Facts in the manifest are true, and the source digest follows imports."""

from __future__ import annotations

import importlib.metadata

import torch

from rldecoder import provenance


def test_source_digest_covers_imports(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    package = tmp_path / "rldecoder"
    (package / "stages").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "stages" / "a.py").write_text("from rldecoder import helper\n")
    (package / "helper.py").write_text("X = 1\n")
    (package / "other.py").write_text("Y = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", package)

    def digest() -> str:
        provenance.source_digest.cache_clear()
        provenance._read_source.cache_clear()
        return provenance.source_digest("rldecoder.stages.a")

    first = digest()
    (package / "other.py").write_text("Y = 2\n")
    assert digest() == first
    (package / "helper.py").write_text("X = 2\n")
    assert digest() != first
    provenance.source_digest.cache_clear()


def test_versions_commit_memory_and_device() -> None:
    assert provenance.package_versions()["torch"] == importlib.metadata.version("torch")
    assert provenance.peak_memory_bytes(torch.device("cpu")) > 50 * 2**20
    assert provenance.device_name(torch.device("cpu"))
    commit = provenance.git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) >= 7

"""Label embeddings: the real model from the installed package, and what happens without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.interp import label_embedding
from rldecoder.interp.label_embedding import label_vectors


def test_labels_that_mean_the_same_are_nearer_than_others() -> None:
    hostile = "</script>\u202e\x00" + "W" * 9000
    labels = ["names of months", "months of the year", "closing brackets in code", hostile]
    found = label_vectors(labels)
    assert found.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    cosine = found @ found.T
    assert cosine[0, 1] > 0.7
    assert cosine[0, 1] > cosine[0, 2] + 0.4
    # Neighbours in a batch, and the padding they bring, change nothing.
    np.testing.assert_allclose(label_vectors(labels[:1])[0], found[0], atol=1e-5)
    assert label_vectors([]).shape == (0, 384)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_embedding, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match="embeddings"):
        label_vectors(["a"])


def test_another_model_under_that_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert importlib.util.find_spec(label_embedding.PACKAGE) is not None
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(label_embedding, "find_spec", lambda name: spec)
    with pytest.raises(DamagedFileError, match="is not the file"):
        label_vectors(["a"])

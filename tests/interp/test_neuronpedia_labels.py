"""Neuronpedia's explanation files: read as data, or said to be none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.interp.neuronpedia_labels import (
    Explanation,
    check_first,
    explanations_digest,
    explanations_of,
    read_explanations,
)

# A line as in v1/gemma-2-2b/12-gemmascope-res-16k/explanations/batch-0.jsonl.gz.
LINE: dict[str, Any] = {
    "modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k", "index": "7", "authorId": "x",
    "description": "references to  dates", "embedding": [0.25, -0.5], "notes": None,
    "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini",
}  # fmt: skip


def lines(*changes: dict[str, Any]) -> bytes:
    """A line a change."""
    return b"".join(json.dumps(LINE | change).encode() + b"\n" for change in changes)


def test_the_dataset_s_files(tmp_path: Path) -> None:
    """Batches in their numbers' order, several explanations of a latent, empty ones counted."""
    folder = tmp_path / "explanations"
    folder.mkdir()
    for number, data in (
        (10, lines({"index": "9", "description": ""})),
        (2, lines({"index": 3, "description": "second"}) + b"\n"),
        (1, lines({"index": 3, "description": "first"}, {})),
    ):
        (folder / f"batch-{number}.jsonl.gz").write_bytes(gzip.compress(data))
    found = read_explanations(tmp_path)
    assert (found.model, found.source, found.empty) == ("gemma-2-2b", "12-gemmascope-res-16k", 1)
    assert [row.text for row in found.rows] == ["first", "second", "references to dates"]
    assert found.rows[-1] == Explanation(
        7, "references to dates", "oai_token-act-pair", "gpt-4o-mini"
    )


def test_plain_lines_and_the_old_export(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_bytes(lines({}))
    (tmp_path / "old.json").write_text(json.dumps({"explanations": [LINE]}))
    (tmp_path / "list.json").write_text(json.dumps([LINE]))
    found = [
        read_explanations(tmp_path / name) for name in ("plain.jsonl", "old.json", "list.json")
    ]
    assert found[0] == found[1] == found[2]


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({}))
    (tmp_path / "b.jsonl").write_bytes(lines({}))
    (tmp_path / "c.jsonl").write_bytes(lines({"index": "8"}))
    first, again, other = (explanations_digest(tmp_path / f"{name}.jsonl") for name in "abc")
    assert first == again != other


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lines({}) + b"{", "line 2"),
        (lines({"index": "x"}), "index is 'x'"),
        (lines({"index": -1}), "index is -1"),
        (lines({"index": True}), "index is True"),
        (lines({"description": 4}), "description"),
        (lines({"layer": 12}), "layer is 12"),
        (b"[1]\n", "no object"),
        (b"\xff\n", "line 1"),
        (lines({"description": "x" * (1 << 20)}), "longer than 1 MB"),
    ],
)
def test_what_is_no_explanation_is_named(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=said):
        read_explanations(path)


def test_a_cut_archive_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(lines({}))[:-12])
    with pytest.raises(DamagedFileError, match="line"):
        read_explanations(path)


def test_files_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="holds no explanations"):
        read_explanations(tmp_path)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(BadInputError, match="holds no explanations"):
        read_explanations(tmp_path / "x.csv")
    (tmp_path / "x.jsonl").write_bytes(lines({}, {"layer": "13-gemmascope-res-16k"}))
    with pytest.raises(BadInputError, match="several SAEs"):
        read_explanations(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_bytes(lines({"description": " "}))
    with pytest.raises(BadInputError, match="holds no explanations"):
        read_explanations(tmp_path / "y.jsonl")


@pytest.mark.parametrize(
    ("source", "hook_layer", "num_latents", "said"),
    [
        ("12-gemmascope-res-16k", 13, 8, None),
        ("5-res-jb", 5, 8, None),
        ("12-gemmascope-res-16k", 12, 8, None),
        ("12-gemmascope-res-16k", 11, 8, "block 12"),
        ("12-gemmascope-mlp-16k", 13, 8, "'mlp'"),
        ("12-gemmascope-att-16k", 13, 8, "'att'"),
        ("12-gemmascope-res-16k", 13, 7, "latent 7"),
    ],
)
def test_explanations_of_another_sae_are_refused(
    source: str, hook_layer: int, num_latents: int, said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines({"layer": source}))
    path = tmp_path / "x.jsonl"

    def check() -> None:
        check_first(path, hook_layer)
        explanations_of(path, hook_layer, num_latents)

    if said is None:
        check()
        return
    with pytest.raises(BadInputError, match=said):
        check()

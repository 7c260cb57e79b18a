"""Explanations as Neuronpedia publishes them: its dataset's files, read as data.

The dataset has `v1/<model>/<source>/explanations/batch-<n>.jsonl.gz`, a JSON object a line:
`modelId`, `layer` (the source, as `12-gemmascope-res-16k`), `index` (the latent, a string),
`description`, `typeName` (how it was explained), `explanationModelName` (by whom), and more that is
not read here. A file, a folder of such batches, or the list that the site's old export answered
with (`.json`) is read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.json_text import parse_json, read_json_file

_MAX_LINE = 1 << 20
"""Bytes; a line has an embedding in it and is long, but not so long."""
_MAX_DESCRIPTION = 2000
"""Characters that are kept of one."""
_ENDINGS = (".jsonl", ".jsonl.gz", ".json")


class Explanation(NamedTuple):
    """What somebody says about a latent."""

    latent: int
    text: str
    method: str
    """How it was made, such as `oai_token-act-pair`; empty where it is not said."""
    explainer: str
    """The model that made it; empty where it is not said."""


class Explanations(NamedTuple):
    """All explanations of one SAE."""

    source: str
    """Neuronpedia's name of the SAE: layer and set."""
    model: str
    """Neuronpedia's name of the model."""
    rows: list[Explanation]
    """By latent, then in the order of the files."""
    empty: int
    """Lines without a description."""


def explanation_files(path: Path) -> list[Path]:
    """The files that a path names.

    Raises:
        BadInputError: there is none.
    """
    if path.is_file() and path.name.endswith(_ENDINGS):
        return [path]
    found: list[Path] = []
    if path.is_dir():
        folder = path / "explanations" if (path / "explanations").is_dir() else path
        found = sorted(
            (file for file in folder.iterdir() if file.name.endswith(_ENDINGS[:2])),
            key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)] or [0],
        )
    if not found:
        raise BadInputError(
            f"{path} holds no explanations.",
            "It is no .jsonl, .jsonl.gz or .json file, and no folder of batch-<n>.jsonl.gz.",
            "Set `label_features.import` to a file or folder of Neuronpedia's dataset "
            "(v1/<model>/<source>/explanations).",
        )
    return found


def explanations_digest(path: Path) -> str:
    """SHA-256 of what the files hold, whatever they are called."""
    digest = hashlib.sha256()
    for file in explanation_files(path):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def read_explanations(path: Path) -> Explanations:
    """Read explanations.

    Raises:
        BadInputError: there are none, or they are of several SAEs.
        DamagedFileError: a line is no explanation; the file and the line are named.
    """
    rows: list[Explanation] = []
    sources: dict[tuple[str, str], None] = {}
    empty = 0

    # Lines without a text are counted, lines of another form are damage: none is skipped unsaid.
    for file in explanation_files(path):
        for place, value in _values(file):
            if not isinstance(value, dict):
                raise _damaged(place, "it is no object")
            text, index = value.get("description"), value.get("index")
            sources[_text(value, "modelId", place), _text(value, "layer", place)] = None
            if not isinstance(index, int | str) or not re.fullmatch(r"\d{1,9}", str(index)):
                raise _damaged(place, f"index is {index!r}, no number of a latent")
            if text is not None and not isinstance(text, str):
                raise _damaged(place, "description is no text")
            if text is None or not text.strip():
                empty += 1
                continue
            rows.append(
                Explanation(
                    int(index),
                    " ".join(text.split())[:_MAX_DESCRIPTION],
                    _text(value, "typeName", place),
                    _text(value, "explanationModelName", place),
                )
            )

    if len(sources) > 1:
        listed = ", ".join("/".join(source) for source in list(sources)[:5])
        raise BadInputError(
            f"{path} has explanations of several SAEs: {listed}.",
            "A latent's number means nothing without its SAE.",
            "Set `label_features.import` to the explanations of one.",
        )
    if not rows:
        raise BadInputError(f"{path} holds no explanations.", "", "Check the file.")
    model, source = next(iter(sources))
    rows.sort(key=lambda row: row.latent)
    return Explanations(source, model, rows, empty)


def explanations_of(path: Path, hook_layer: int, num_latents: int) -> Explanations:
    """`read_explanations` of a run's SAE: what cannot be of it is refused.

    Raises:
        BadInputError: there are none, or they are of another SAE.
        DamagedFileError: a line is no explanation.
    """
    found = read_explanations(path)
    check_source(found.source, hook_layer)
    largest = found.rows[-1].latent
    if largest >= num_latents:
        raise BadInputError(
            f"The explanations go up to latent {largest}, and the run's SAE has {num_latents}.",
            f"They are of {found.source}.",
            "Set `label_features.import` to the explanations of the run's SAE.",
        )
    return found


def check_source(source: str, hook_layer: int) -> None:
    """Refuse explanations that cannot be of the SAE at the run's hook layer.

    Args:
        source: Neuronpedia's name of their SAE.

    Raises:
        BadInputError: they are of another layer, or of no residual stream.
    """
    parts = source.lower().split("-")
    mend = "Set `label_features.import` to the explanations of the run's SAE."
    layer = int(parts[0]) if parts[0].isdigit() else None
    # The site counts blocks: 12 is the output of block 12 (or, in old sets, its input).
    if layer is not None and hook_layer not in (layer, layer + 1):
        raise BadInputError(
            f"The explanations are of {source}, block {layer}, and the run's SAE reads layer "
            f"{hook_layer}.",
            "Neuronpedia counts blocks from 0; the output of block 12 is layer 13 here.",
            mend,
        )
    for name in ("mlp", "att", "attn", "transcoder", "clt"):
        if name in parts:
            raise BadInputError(
                f"The explanations are of {source}, and the run's SAE reads the residual stream.",
                f"{name!r} is another place of the model.",
                mend,
            )


def check_first(path: Path, hook_layer: int) -> None:
    """`check_source` of the first line: what can be known to be wrong without reading it all.

    Raises:
        BadInputError: there are no explanations, or they are of another SAE.
        DamagedFileError: the first line is no explanation.
    """
    for place, value in _values(explanation_files(path)[0]):
        if not isinstance(value, dict):
            raise _damaged(place, "it is no object")
        check_source(_text(value, "layer", place), hook_layer)
        return


def _values(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, JSON value) of every explanation in a file."""
    if file.name.endswith(".json"):
        try:
            value = read_json_file(file)
        except (OSError, ValueError) as error:
            raise _damaged(str(file), str(error)) from error
        listed = value.get("explanations") if isinstance(value, dict) else value
        if not isinstance(listed, list):
            raise _damaged(str(file), "it is no list of explanations")
        yield from ((f"{file}, entry {number}", row) for number, row in enumerate(listed, 1))
        return
    number = 0
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as stream:
            while line := stream.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise ValueError(f"it is longer than {_MAX_LINE >> 20} MB")
                if line.strip():
                    entry = parse_json(line.decode("utf-8"), unique_keys=True)
                    yield f"{file}, line {number}", entry
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(f"{file}, line {number}", str(error)) from error


def _text(value: dict[str, Any], key: str, place: str) -> str:
    found = value.get(key)
    if found is not None and not isinstance(found, str):
        raise _damaged(place, f"{key} is {json.dumps(found)[:80]}, no text")
    return (found or "")[:200]


def _damaged(place: str, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"{place} is no explanation of Neuronpedia's.", f"{why}.", "Download the file again."
    )

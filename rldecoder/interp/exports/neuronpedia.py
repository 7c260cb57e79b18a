"""Neuronpedia's import files: `<model>/<source>/` with JSON lines of each database table.

    release.jsonl  model.jsonl  sourceset.jsonl  source.jsonl
    features/batch-<n>.jsonl.gz  activations/batch-<n>.jsonl.gz  explanations/batch-<n>.jsonl.gz

Format: Neuronpedia's admin import (apps/webapp, api/admin/import) and the rows that its
`neuronpedia-utils` write. The importer takes its columns from a file's first line, so all lines of
a file have the same keys. A latent without a label gets no explanation: nothing stands in for it.
The labeler's name goes into `notes`: `typeName` and `explanationModelName` point into tables of
the site, where an unknown name is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from rldecoder.errors import BadInputError
from rldecoder.files import write_bytes
from rldecoder.interp.exports import saedashboard
from rldecoder.interp.exports.material import Activation, ExportFeature, ExportMaterial, Profile
from rldecoder.interp.records import FeatureLabel
from rldecoder.interp.shown import shown


class Publication(NamedTuple):
    """Under which names the features appear."""

    model_id: str
    """The model's id on the site, such as `smollm2-135m-instruct`."""
    source_set: str
    """Name of the SAE, without layer; letters, digits, `-` and `_`."""
    author_id: str
    """The site's id of the account that imports."""
    author: str
    """Its name."""
    title: str
    created_at: datetime


class _Made(BaseModel):
    """Who made a row of a table, and when."""

    creatorId: str
    createdAt: str


class Release(_Made):
    """The row of `release.jsonl`."""

    name: str
    description: str
    descriptionShort: str
    creatorName: str
    creatorNameShort: str
    urls: list[str] = []
    visibility: str = "PRIVATE"


class Model(_Made):
    """The row of `model.jsonl`; its sizes are the importing account's to fill in."""

    id: str
    instruct: bool
    displayNameShort: str
    displayName: str
    layers: int = 0
    neuronsPerLayer: int = 0
    owner: str = ""
    updatedAt: str
    visibility: str = "PRIVATE"


class SourceSet(_Made):
    """The row of `sourceset.jsonl`."""

    modelId: str
    name: str
    description: str
    type: str = "SAE"
    creatorName: str
    releaseName: str
    urls: list[str] = []
    hasDashboards: bool = True
    visibility: str = "PRIVATE"


class Source(_Made):
    """The row of `source.jsonl`."""

    id: str
    modelId: str
    setName: str
    dataset: str
    num_prompts: int
    num_tokens_in_prompt: int
    hasDashboards: bool = True
    visibility: str = "PRIVATE"
    notes: str


class _OfSource(BaseModel):
    """A row about one latent of a source, whose number is `index`."""

    modelId: str
    layer: str
    """The source's id."""
    createdAt: str


class _Measured(_OfSource):
    creatorId: str


class FeatureRow(Profile, _Measured):
    """A line of `features/`."""

    index: str
    maxActApprox: float
    hasVector: bool = False
    hookName: str


class ActivationRow(_Measured):
    """A line of `activations/`."""

    id: str
    index: str
    tokens: list[str]
    values: list[float]
    maxValue: float
    maxValueTokenIndex: int
    minValue: float
    binMin: float
    binMax: float
    binContains: float
    qualifyingTokenIndex: int
    dfaValues: list[float] = []
    lossValues: list[float] = []


class ExplanationRow(_OfSource):
    """A line of `explanations/`."""

    authorId: str
    id: str
    index: str
    description: str
    typeName: None = None
    explanationModelName: None = None
    notes: str


def source_id(material: ExportMaterial, names: Publication) -> str:
    """The source's id: layer and set, as in `23-res-5k`."""
    return f"{material.layer}-{names.source_set}"


def write(folder: Path, material: ExportMaterial, names: Publication) -> Path:
    """Write all files below `folder`; returns the source's folder.

    Raises:
        BadInputError: a name that cannot be a folder of its own.
    """
    for name in (names.model_id, names.source_set):
        if not name or not all(char.isalnum() or char in "-_." for char in name) or name[0] == ".":
            raise BadInputError(
                f"{name!r} cannot be a Neuronpedia id.",
                "Ids are parts of addresses and folder names.",
                "Use letters, digits, - and _ only.",
            )

    source = source_id(material, names)
    target = folder / names.model_id / source
    for table, row in _tables(material, names).items():
        _write_lines(target / f"{table}.jsonl", [row])

    # The site imports features, activations and explanations by batches of the same number.
    common = {
        "modelId": names.model_id, "layer": source, "createdAt": names.created_at.isoformat()
    }  # fmt: skip
    made = common | {"creatorId": names.author_id}
    for number, features in enumerate(saedashboard.batches(material)):
        rows: dict[str, Iterable[BaseModel]] = {
            "features": (_feature(feature, material.hook_name, made) for feature in features),
            "activations": (
                _activation(row, feature.record.latent, rank, made)
                for feature in features
                for rank, row in enumerate(feature.activations)
            ),
            "explanations": (
                _explanation(feature.record, common | {"authorId": names.author_id})
                for feature in features
            ),
        }
        for kind, lines in rows.items():
            _write_lines(target / kind / f"batch-{number}.jsonl.gz", lines)
    return target


def _tables(material: ExportMaterial, names: Publication) -> dict[str, BaseModel]:
    """The one row of each of the four tables that describe a source.

    All is private: the importing account decides who may look.
    """
    created = names.created_at.isoformat()
    made = {"creatorId": names.author_id, "createdAt": created}

    # The source set names release and model; the source names model and set.
    return {
        "release": Release(
            **made,
            name=names.source_set,
            description=names.title,
            descriptionShort=names.title,
            creatorName=names.author,
            creatorNameShort=names.author,
        ),
        "model": Model(
            **made,
            id=names.model_id,
            instruct="instruct" in names.model_id or names.model_id.endswith("-it"),
            displayNameShort=names.model_id,
            displayName=names.model_id,
            updatedAt=created,
        ),
        "sourceset": SourceSet(
            **made,
            modelId=names.model_id,
            name=names.source_set,
            description=names.title,
            creatorName=names.author,
            releaseName=names.source_set,
        ),
        "source": Source(
            **made,
            id=source_id(material, names),
            modelId=names.model_id,
            setName=names.source_set,
            dataset=material.dataset,
            num_prompts=material.num_sequences,
            num_tokens_in_prompt=material.context_length,
            notes=f"{material.hook_name}; {material.num_latents} latents, "
            f"of which {len(material.features)} are here",
        ),
    }


def _feature(feature: ExportFeature, hook_name: str, made: dict[str, str]) -> FeatureRow:
    windows = [row.values for row in feature.activations]
    return FeatureRow(
        **dict(feature.profile),
        **made,
        index=str(feature.record.latent),
        maxActApprox=max(map(max, windows), default=0.0),
        hookName=hook_name,
    )


def _activation(row: Activation, latent: int, rank: int, made: dict[str, str]) -> ActivationRow:
    return ActivationRow(
        **made,
        id=_id(made["modelId"], made["layer"], latent, "activation", rank),
        index=str(latent),
        tokens=row.tokens,
        values=row.values,
        maxValue=max(row.values),
        maxValueTokenIndex=row.values.index(max(row.values)),
        minValue=min(row.values),
        binMin=row.bin_min,
        binMax=row.bin_max,
        binContains=row.bin_contains,
        qualifyingTokenIndex=row.qualifying_token_index,
    )


def _explanation(record: FeatureLabel, common: dict[str, str]) -> ExplanationRow:
    said = shown(record)
    output = record.output
    notes = {
        "kind": record.kind,
        "is_label": said.is_label,
        "labeler": record.labeler,
        "confidence": record.confidence,
        "confidence_interval": [record.confidence_low, record.confidence_high],
        "high_confidence": record.high_confidence,
        "scores": record.scores.model_dump(mode="json"),
        "raises": [] if output is None else [gain.token for gain in output.raised],
        "lowers": [] if output is None else [gain.token for gain in output.lowered],
        "output_scores": None if output is None else output.scores.model_dump(mode="json"),
    }
    return ExplanationRow(
        **common,
        id=_id(common["modelId"], common["layer"], record.latent, "explanation", 0),
        index=str(record.latent),
        description=said.text,
        notes=json.dumps(notes),
    )


def _id(*parts: object) -> str:
    """25 characters like the site's ids, the same for the same row at every export."""
    return "c" + hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _write_lines(path: Path, rows: Iterable[BaseModel]) -> None:
    """JSON lines, gzipped if the name says so; the file appears when it is whole."""
    text = "".join(json.dumps(row.model_dump(), allow_nan=False) + "\n" for row in rows)
    data = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime 0: the same features give the same bytes.
    write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)

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
import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from rldecoder.errors import BadInputError
from rldecoder.interp.exports import saedashboard
from rldecoder.interp.exports.material import ExportMaterial
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
    for kind in ("features", "activations", "explanations"):
        (target / kind).mkdir(parents=True, exist_ok=True)
    created = names.created_at.isoformat()
    for table, row in _metadata(material, names, source, created).items():
        _write_lines(target / f"{table}.jsonl", [row])

    # The site imports features, activations and explanations by batches of the same number.
    records = {feature.record.latent: feature.record for feature in material.features}
    for number, batch in enumerate(
        saedashboard.batches(material, names.model_id, names.source_set)
    ):
        common = {"modelId": names.model_id, "layer": source, "createdAt": created}
        made = common | {"creatorId": names.author_id}
        features = batch["features"]
        name = f"batch-{number}.jsonl.gz"
        _write_lines(target / "features" / name, (_feature(f, made, material) for f in features))
        _write_lines(
            target / "activations" / name,
            (
                _activation(row, feature["feature_index"], rank, made)
                for feature in features
                for rank, row in enumerate(feature["activations"])
            ),
        )
        _write_lines(
            target / "explanations" / name,
            (
                _explanation(record, common | {"authorId": names.author_id})
                for record in (records[feature["feature_index"]] for feature in features)
            ),
        )
    return target


def _metadata(
    material: ExportMaterial, names: Publication, source: str, created: str
) -> dict[str, dict[str, Any]]:
    """The one row of each of the four tables that describe a source."""
    made = {"creatorId": names.author_id, "createdAt": created}

    # Sizes are 0 and all is private: the importing account knows them, and decides who may look.
    return {
        "release": made
        | {
            "name": names.source_set,
            "description": names.title,
            "descriptionShort": names.title,
            "creatorName": names.author,
            "creatorNameShort": names.author,
            "urls": [],
            "visibility": "PRIVATE",
        },
        "model": made
        | {
            "id": names.model_id,
            "instruct": "instruct" in names.model_id or names.model_id.endswith("-it"),
            "displayNameShort": names.model_id,
            "displayName": names.model_id,
            "layers": 0,
            "neuronsPerLayer": 0,
            "owner": "",
            "updatedAt": created,
            "visibility": "PRIVATE",
        },
        "sourceset": made
        | {
            "modelId": names.model_id,
            "name": names.source_set,
            "description": names.title,
            "type": "SAE",
            "creatorName": names.author,
            "releaseName": names.source_set,
            "urls": [],
            "hasDashboards": True,
            "visibility": "PRIVATE",
        },
        "source": made
        | {
            "id": source,
            "modelId": names.model_id,
            "setName": names.source_set,
            "dataset": material.dataset,
            "num_prompts": material.num_sequences,
            "num_tokens_in_prompt": material.context_length,
            "hasDashboards": True,
            "visibility": "PRIVATE",
            "notes": f"{material.hook_name}; {material.num_latents} latents, "
            f"of which {len(material.features)} are here",
        },
    }


def _feature(
    feature: dict[str, Any], made: dict[str, Any], material: ExportMaterial
) -> dict[str, Any]:
    left_out = ("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations")
    shared = {name: value for name, value in feature.items() if name not in left_out}
    strongest = max((max(row["values"]) for row in feature["activations"]), default=0.0)
    return (
        made
        | shared
        | {
            "index": str(feature["feature_index"]),
            "maxActApprox": strongest,
            "hasVector": False,
            "hookName": material.hook_name,
        }
    )


def _activation(
    row: dict[str, Any], latent: int, rank: int, made: dict[str, Any]
) -> dict[str, Any]:
    values = row["values"]
    return made | {
        "id": _id(made["modelId"], made["layer"], latent, "activation", rank),
        "index": str(latent),
        "tokens": row["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "binMin": row["bin_min"],
        "binMax": row["bin_max"],
        "binContains": row["bin_contains"],
        "qualifyingTokenIndex": row["qualifying_token_index"],
        "dfaValues": [],
        "lossValues": [],
    }


def _explanation(record: FeatureLabel, common: dict[str, Any]) -> dict[str, Any]:
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
    return common | {
        "id": _id(common["modelId"], common["layer"], record.latent, "explanation", 0),
        "index": str(record.latent),
        "description": said.text,
        "typeName": None,
        "explanationModelName": None,
        "notes": json.dumps(notes),
    }


def _id(*parts: object) -> str:
    """25 characters like the site's ids, the same for the same row at every export."""
    return "c" + hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, gzipped if the name says so; the file appears when it is whole."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    data = text.encode()
    aside = path.with_name(f".{path.name}.writing")
    # mtime 0: the same features give the same bytes.
    aside.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    os.replace(aside, path)

"""The command that writes labelled features for other tools."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape

from rldecoder.artifacts import catalogue
from rldecoder.errors import BadInputError, require_empty

if TYPE_CHECKING:
    from rldecoder.run import Run


class ExportInputs(NamedTuple):
    """What is exported, or needed for it."""

    model: catalogue.ModelFolder
    corpus: catalogue.Corpus
    cache: catalogue.ActivationCache
    sae: catalogue.TrainedSae
    final: catalogue.FinalDecoder
    labels: catalogue.Labels


class Tool(StrEnum):
    """Who reads the files."""

    NEURONPEDIA = "neuronpedia"
    SAEDASHBOARD = "saedashboard"
    DELPHI = "delphi"


class Names(NamedTuple):
    """Under which names the features appear elsewhere."""

    model_id: str | None
    source_set: str
    author: str
    author_id: str | None


def export_features(run: Run, tool: Tool, out: Path, names: Names, console: Console) -> None:
    """Write a run's features, or its activations, as `tool` reads them.

    Raises:
        BadInputError: the run has no labels yet, or `out` holds something already.
    """
    require_empty(out, "Files of an earlier export would be mixed with the new ones.")
    if tool is Tool.NEURONPEDIA and names.author_id is None:
        raise BadInputError(
            "Neuronpedia files name the account that imports them.",
            "No --author-id was given, and the features must not appear under someone else's.",
            "Add --author-id with your user id on the site that you import into.",
        )
    inputs = run.inputs(ExportInputs, "to export")
    config = run.config
    path = write_export(
        inputs,
        tool,
        out,
        names,
        fit_tokens=config.label_features.fit_tokens,
        dataset=f"{', '.join(source.type for source in config.ingest.sources)} (split label)",
        created_at=datetime.now(UTC),
    )
    console.print(f"written: {escape(str(path))}")
    for caveat in inputs.labels.caveats:
        console.print(f"[yellow]caveat[/yellow] {escape(caveat)}")


def write_export(
    inputs: ExportInputs,
    tool: Tool,
    out: Path,
    names: Names,
    *,
    fit_tokens: int,
    dataset: str,
    created_at: datetime,
) -> Path:
    """The export of a run's artifacts; returns what to hand on."""
    import numpy as np

    from rldecoder.data.shards import read_token_table
    from rldecoder.interp.corpus import read_firings, with_documents
    from rldecoder.interp.exports import delphi_cache, material, neuronpedia, saedashboard
    from rldecoder.interp.vocabulary import Vocabulary

    labels = inputs.labels.labels
    lm, sae = inputs.model.load(), inputs.sae.load()

    # Firings of the labelled latents, or, for delphi, of all.
    latents = np.array([feature.latent for feature in labels.features], np.int64)
    split = read_firings(
        inputs.cache.reader("label"),
        sae,
        split="label",
        latents=None if tool is Tool.DELPHI else latents,
        max_tokens=fit_tokens,
    )
    grid = with_documents(split.grid, read_token_table(inputs.corpus.folder, "label"))
    split = split._replace(grid=grid)

    if tool is Tool.DELPHI:
        pad = lm.tokenizer.pad_token_id
        return delphi_cache.write(
            out,
            split,
            hook_layer=sae.spec.hook_layer,
            num_latents=sae.num_latents,
            model=names.model_id or str(inputs.model.model),
            dataset=dataset,
            pad_token=int(lm.tokenizer.eos_token_id or 0) if pad is None else int(pad),
        )

    gathered = material.gather(
        labels,
        inputs.labels.examples,
        split,
        sae,
        inputs.final.load(lm, sae),
        Vocabulary.from_tokenizer(lm.tokenizer, lm.vocab_size),
        dataset,
    )
    model_id = names.model_id or Path(labels.model_name).name
    if tool is Tool.SAEDASHBOARD:
        saedashboard.write(out, gathered, model_id, names.source_set)
        return out

    assert names.author_id is not None  # refused by `export_features`
    title = f"{gathered.num_latents} latents of {gathered.hook_name}"
    publication = neuronpedia.Publication(
        model_id, names.source_set, names.author_id, names.author, title, created_at
    )
    return neuronpedia.write(out, gathered, publication)

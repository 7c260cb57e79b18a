"""The command that writes labelled features for other tools."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError, require_empty

NEEDED = (
    "sync_tokenizer", "ingest", "cache_activations", "train_sae", "freeze_decoder",
    "label_features",
)  # fmt: skip


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


def export_features(
    run: RunConfig, store: ArtifactStore, tool: Tool, out: Path, names: Names, console: Console
) -> None:
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
    from rldecoder.runner import open_artifact, plan
    from rldecoder.stages.table import stage_named

    refs = plan(run)
    missing = [name for name in NEEDED if not store.is_published(refs[name])]
    if missing:
        raise BadInputError(
            "There is nothing to export yet.",
            f"Missing in {store.root}: {', '.join(missing)}.",
            "Finish the run with `rldecoder run CONFIG`, using the same --store and --set.",
        )
    inputs = {name: open_artifact(stage_named(name).artifact, refs[name], store) for name in NEEDED}
    path = write_export(
        {name: artifact.folder for name, artifact in inputs.items()},
        tool,
        out,
        names,
        fit_tokens=run.label_features.fit_tokens,
        dataset=f"{', '.join(source.type for source in run.ingest.sources)} (split label)",
        created_at=datetime.now(UTC),
    )
    console.print(f"written: {escape(str(path))}", highlight=False)
    for caveat in inputs["label_features"].caveats:
        console.print(f"[yellow]caveat[/yellow] {escape(caveat)}", highlight=False)


def write_export(
    folders: dict[str, Path],
    tool: Tool,
    out: Path,
    names: Names,
    *,
    fit_tokens: int,
    dataset: str,
    created_at: datetime,
) -> Path:
    """The export of the artifacts in `folders` (by stage name); returns what to hand on."""
    import numpy as np

    from rldecoder import schemas
    from rldecoder.artifacts.catalogue import Labels
    from rldecoder.data.activation_reader import ActivationReader
    from rldecoder.data.shards import read_token_table
    from rldecoder.decoder.loading import load_decoder
    from rldecoder.interp.corpus import read_firings, with_documents
    from rldecoder.interp.examples import EXAMPLES
    from rldecoder.interp.exports import delphi_cache, material, neuronpedia, saedashboard
    from rldecoder.interp.records import FeatureLabels
    from rldecoder.interp.vocabulary import Vocabulary
    from rldecoder.lm.frozen import FrozenLM
    from rldecoder.sae.model import Sae

    labels = FeatureLabels.load(Labels.labels.path(folders["label_features"]))
    model_folder = folders["sync_tokenizer"] / "model"
    lm = FrozenLM.load(model_folder)
    sae = Sae.load(folders["train_sae"] / "sae")
    latents = np.array([feature.latent for feature in labels.features], np.int64)
    split = read_firings(
        ActivationReader(folders["cache_activations"], "label"),
        sae,
        split="label",
        latents=None if tool is Tool.DELPHI else latents,
        max_tokens=fit_tokens,
    )
    grid = with_documents(split.grid, read_token_table(folders["ingest"], "label"))
    split = split._replace(grid=grid)
    if tool is Tool.DELPHI:
        pad = lm.tokenizer.pad_token_id
        return delphi_cache.write(
            out,
            split,
            hook_layer=sae.spec.hook_layer,
            num_latents=sae.num_latents,
            model=names.model_id or str(model_folder),
            dataset=dataset,
            pad_token=int(lm.tokenizer.eos_token_id or 0) if pad is None else int(pad),
        )
    found = material.gather(
        labels,
        schemas.read_parquet(folders["label_features"] / "examples.parquet", EXAMPLES.names),
        split,
        sae,
        load_decoder(folders["freeze_decoder"] / "decoder", lm, sae),
        Vocabulary.from_tokenizer(lm.tokenizer, lm.vocab_size),
        dataset,
    )
    model_id = names.model_id or Path(labels.model_name).name
    if tool is Tool.SAEDASHBOARD:
        saedashboard.write(out, found, model_id, names.source_set)
        return out
    assert names.author_id is not None  # refused above
    title = f"{found.num_latents} latents of {found.hook_name}"
    publication = neuronpedia.Publication(
        model_id, names.source_set, names.author_id, names.author, title, created_at
    )
    return neuronpedia.write(out, found, publication)

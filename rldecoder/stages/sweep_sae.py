"""Compare small SAEs over layers, k and expansion, and say which layer to decode.

In: model, tokens. Out: `sweep.parquet`, `sweep.svg`, `verdict.json` and the SAEs, in `saes/`. One
pass over the text serves all layers. A killed run repeats that pass and goes on with the cells that
are not yet measured.
Nothing downstream follows the verdict by itself: set `cache_activations.hook_layer` to it.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pyarrow as pa
import torch
from matplotlib.figure import Figure

from rldecoder.artifacts import sealed
from rldecoder.config.sae import SweepSaeConfig
from rldecoder.data.shards import read_tokens
from rldecoder.errors import BadInputError
from rldecoder.files import remove
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.sweep import choose, collect, measure, sae_folder, train_small
from rldecoder.schemas import read_json, write_json, write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

CELLS = pa.schema(
    [
        ("layer", pa.int32()),
        ("k", pa.int32()),
        ("expansion", pa.float64()),
        ("fvu", pa.float64()),
        ("l0", pa.float64()),
        ("dead_fraction", pa.float64()),
        ("splice_kl", pa.float64()),
        ("decoder_kl", pa.float64()),
        ("decoder_agreement", pa.float64()),
        ("residual_lens_kl", pa.float64()),
        ("random_sae_kl", pa.float64()),
    ]
)
"""`sweep.parquet`: a row a cell; KL in nats per token, decoders are closed-form affine lenses."""


def run(
    inputs: Mapping[str, InputArtifact], config: SweepSaeConfig, ctx: StageContext
) -> StageOutput:
    """Publish every cell, a figure and the verdict; without layers, that none was asked for."""
    seed_everything(ctx.seed)
    if not config.layers:
        write_json(
            ctx.out / "verdict.json", {"meets_limits": None, "why": "no sweep was asked for"}
        )
        return StageOutput({"cells": 0})
    ingest, model = inputs["ingest"].path, inputs["sync_tokenizer"].path
    lm = FrozenLM.load(model / "model", device=ctx.device)
    if max(config.layers) > lm.num_layers:
        raise BadInputError(
            f"`sweep_sae.layers` is {list(config.layers)}.",
            f"The model has {lm.num_layers} blocks.",
            f"Choose layers from 1 to {lm.num_layers}.",
        )
    length = read_tokens(ingest, "train", 1).shape[1]
    tokens = {
        split: torch.from_numpy(read_tokens(ingest, split, max(1, budget // length)))
        for split, budget in (("train", config.train_tokens), ("test", config.test_tokens))
    }
    total = sum(ids.numel() for ids in tokens.values())
    with ctx.report.track("sweep: activations", total, "tokens") as bar:
        data = {
            split: collect(lm, ids, config.layers, config.micro_batch_sequences, bar.advance)
            for split, ids in tokens.items()
        }

    cells = list(itertools.product(config.layers, config.ks, config.expansions))
    done_path = ctx.progress / "cells.json"
    done = _done_before(done_path, ctx)
    sequences = tokens["test"][: config.splice_sequences]
    name = str(read_json(model / "model.json")["name"])
    steps = max(1, config.training.budget_tokens // config.training.batch_tokens)
    with ctx.report.track("sweep: SAEs", len(cells) * steps, "steps", len(done) * steps) as bar:
        for layer, k, expansion in cells:
            key = f"{layer}/{k}/{expansion:g}"
            if key in done:
                continue
            setting = config.training.model_copy(update={"k": k, "expansion": expansion})
            seed = derive_seed(ctx.seed, key)
            train, test = data["train"][layer], data["test"][layer]
            sae = train_small(
                train.resid, setting, seed, hook_layer=layer, model_name=name,
                after_step=lambda: bar.advance(1), device=ctx.device,
            )  # fmt: skip
            row = measure(lm, sae, train, test, sequences, seed)
            folder = ctx.progress / sae_folder(layer, k, expansion)
            remove(folder)
            sae.save(folder)
            done[key] = {
                "row": {"layer": layer, "k": k, "expansion": expansion, **row},
                "files": sealed.hashes(ctx.progress, [folder]),
            }
            sealed.write(done_path, done, owner=ctx.owner)
            ctx.report.note(
                f"layer {layer}, k {k}, expansion {expansion:g}: fvu {row['fvu']:.3f}, "
                f"decoder KL {row['decoder_kl']:.2f}"
            )

    rows = [done[f"{layer}/{k}/{expansion:g}"]["row"] for layer, k, expansion in cells]
    verdict = choose(rows, config)
    for cell in cells:
        shutil.copytree(ctx.progress / sae_folder(*cell), ctx.out / sae_folder(*cell))
    write_parquet(
        ctx.out / "sweep.parquet", {n: [row[n] for row in rows] for n in CELLS.names}, CELLS
    )
    write_json(ctx.out / "verdict.json", verdict)
    _figure(rows, config, ctx.out / "sweep.svg")
    ctx.report.note(f"sweep: {verdict['why']}")
    return StageOutput(
        {
            "cells": len(rows),
            "layer": verdict["cell"]["layer"],
            "decoder_kl": verdict["cell"]["decoder_kl"],
            "meets_limits": verdict["meets_limits"],
        }
    )


def _done_before(path: Path, ctx: StageContext) -> dict[str, dict[str, Any]]:
    """Cells of an earlier, interrupted run whose SAEs are as they were, by their keys.

    Each has its `row` of the table, and the hashes of its `files` in the progress folder.
    """
    found = sealed.read_or(path, {}, owner=ctx.owner, note=ctx.report.note)
    done = {}
    for key, cell in found.items():
        changed = sealed.first_changed(ctx.progress, cell["files"])
        if changed is None:
            done[key] = cell
        else:
            ctx.report.note(f"Cell {key} of the sweep is trained again: {changed}.")
    return done


def _figure(rows: Sequence[Mapping[str, Any]], config: SweepSaeConfig, path: Path) -> None:
    """fvu, splice KL and decoder KL by layer, a line for each (k, expansion)."""
    with mpl.rc_context({"svg.hashsalt": "rldecoder", "font.size": 9}):
        figure = Figure(figsize=(9.0, 3.0), layout="constrained")
        panels = (("fvu", "fvu"), ("splice_kl", "splice KL, nats"), ("decoder_kl", "decoder KL"))
        for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
            for k, expansion in itertools.product(config.ks, config.expansions):
                line = [r for r in rows if (r["k"], r["expansion"]) == (k, expansion)]
                axes.plot(
                    [row["layer"] for row in line], [row[name] for row in line],
                    marker="o", label=f"k {k}, {expansion:g}x",
                )  # fmt: skip
            if name == "decoder_kl":
                layers = sorted({row["layer"]: row["residual_lens_kl"] for row in rows}.items())
                axes.plot(*zip(*layers, strict=True), color="#999999", ls="--", label="no SAE")
                axes.legend(frameon=False)
            axes.set_xlabel("layer")
            axes.set_title(title)
            axes.set_ylim(bottom=0)
        figure.savefig(path, format="svg", metadata={"Date": None})

"""Compare small SAEs over layers, k and expansion, and say which layer to decode.

One pass over the text serves all layers. A killed run repeats that pass and goes on with the cells
that are not yet measured.
Nothing downstream follows the verdict by itself: set `cache_activations.hook_layer` to it.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from rldecoder import sealed
from rldecoder.artifacts.catalogue import Sweep
from rldecoder.config.sae import SweepSaeConfig
from rldecoder.data.shards import first_sequences
from rldecoder.errors import BadInputError
from rldecoder.figures import svg_figure
from rldecoder.files import remove
from rldecoder.sae import sweep
from rldecoder.schemas import JsonRecord
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import TextInputs

DONE_FILE = "cells.json"
"""In the progress folder: cells that are measured."""


class DoneCell(JsonRecord):
    """A cell that is measured, in the progress folder."""

    row: sweep.SweepCell
    """As it is published."""
    files: dict[str, str]
    """SHA-256 of its SAE's files, by their paths in the progress folder."""


def run(inputs: TextInputs, config: SweepSaeConfig, ctx: StageContext) -> Output:
    """Publish every cell, a figure and the verdict; without layers, that none was asked for."""
    seed_everything(ctx.seed)
    if not config.layers:
        none = sweep.SweepVerdict(meets_limits=None, why="no sweep was asked for")
        Sweep.verdict_record.save(ctx.out, none)
        return Output({"cells": 0})
    lm = inputs.model.load(ctx.device)
    if max(config.layers) > lm.num_layers:
        raise BadInputError(
            f"`sweep_sae.layers` is {list(config.layers)}.",
            f"The model has {lm.num_layers} blocks.",
            f"Choose layers from 1 to {lm.num_layers}.",
        )

    # One pass over the text, kept in memory, serves every layer.
    tokens = {
        split: first_sequences(inputs.corpus.folder, split, budget)
        for split, budget in (("train", config.train_tokens), ("test", config.test_tokens))
    }
    total = sum(ids.numel() for ids in tokens.values())
    with ctx.report.track("sweep: activations", total, "tokens") as bar:
        data = {
            split: sweep.collect(lm, ids, config.layers, config.micro_batch_sequences, bar.advance)
            for split, ids in tokens.items()
        }

    settings = [
        sweep.Setting(*cell)
        for cell in itertools.product(config.layers, config.ks, config.expansions)
    ]
    done = _done_before(ctx)
    sequences = tokens["test"][: config.splice_sequences]
    steps = max(1, config.training.budget_tokens // config.training.batch_tokens)
    with ctx.report.track("sweep: SAEs", len(settings) * steps, "steps", len(done) * steps) as bar:
        for setting in settings:
            if setting.key in done:
                continue
            layer, k, expansion = setting
            seed = derive_seed(ctx.seed, setting.key)
            train, test = data["train"][layer], data["test"][layer]
            sae = sweep.train_small(
                train.resid,
                config.training.model_copy(update={"k": k, "expansion": expansion}),
                seed,
                hook_layer=layer,
                model_name=inputs.model.record.name,
                after_step=lambda: bar.advance(1),
                device=ctx.device,
            )
            quality = sweep.measure(lm, sae, train, test, sequences, seed)

            # The SAE first: a cell counts as done only with the hashes of its files.
            folder = Sweep.saes.path(ctx.progress) / setting.folder
            remove(folder)
            sae.save(folder)
            done[setting.key] = DoneCell(
                row=sweep.SweepCell(**setting._asdict(), **dict(quality)),
                files=sealed.hashes(ctx.progress, [folder]),
            )
            sealed.write(
                ctx.progress / DONE_FILE,
                {key: cell.model_dump(mode="json") for key, cell in done.items()},
                owner=ctx.owner,
            )
            ctx.report.note(
                f"layer {layer}, k {k}, expansion {expansion:g}: fvu {quality.fvu:.3f}, "
                f"decoder KL {quality.decoder_kl:.2f}"
            )

    cells = [done[setting.key].row for setting in settings]
    verdict = sweep.choose(cells, config)
    saes = Sweep.saes.path(ctx.out)
    for setting in settings:
        shutil.copytree(Sweep.saes.path(ctx.progress) / setting.folder, saes / setting.folder)
    Sweep.cells.save_rows(ctx.out, [dict(cell) for cell in cells])
    Sweep.verdict_record.save(ctx.out, verdict)
    _figure(cells, config, Sweep.figure.path(ctx.out))
    ctx.report.note(f"sweep: {verdict.why}")
    return Output({"cells": len(cells)} | verdict.headline)


def _done_before(ctx: StageContext) -> dict[str, DoneCell]:
    """Cells of an earlier, interrupted run whose SAEs are as they were, by their keys."""
    found = sealed.read_or(ctx.progress / DONE_FILE, {}, owner=ctx.owner, note=ctx.report.note)
    done = {}
    for key, value in found.items():
        cell = DoneCell.model_validate(value)
        changed = sealed.first_changed(ctx.progress, cell.files)
        if changed is None:
            done[key] = cell
        else:
            ctx.report.note(f"Cell {key} of the sweep is trained again: {changed}.")
    return done


def _figure(cells: Sequence[sweep.SweepCell], config: SweepSaeConfig, path: Path) -> None:
    """fvu, splice KL and decoder KL by layer, a line for each (k, expansion)."""
    with svg_figure(path, (9.0, 3.0)) as figure:
        panels = (("fvu", "fvu"), ("splice_kl", "splice KL, nats"), ("decoder_kl", "decoder KL"))
        for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
            for k, expansion in itertools.product(config.ks, config.expansions):
                line = [cell for cell in cells if cell.setting[1:] == (k, expansion)]
                axes.plot(
                    [cell.layer for cell in line], [getattr(cell, name) for cell in line],
                    marker="o", label=f"k {k}, {expansion:g}x",
                )  # fmt: skip
            if name == "decoder_kl":
                layers = sorted({cell.layer: cell.residual_lens_kl for cell in cells}.items())
                axes.plot(*zip(*layers, strict=True), color="#999999", ls="--", label="no SAE")
                axes.legend(frameon=False)
            axes.set_xlabel("layer")
            axes.set_title(title)
            axes.set_ylim(bottom=0)

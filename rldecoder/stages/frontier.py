"""How faithful a decoder can be from each layer: train one for every layer, k and depth.

`train_decoder.depth: auto` follows the verdict's depths. A killed run goes on with the cells that
are not yet measured.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib as mpl
from torch import Tensor

from rldecoder import sealed
from rldecoder.artifacts.catalogue import Frontier, Sweep
from rldecoder.config.decoder import FrontierConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationMeta, ActivationWriter
from rldecoder.data.forward import ActivationPass
from rldecoder.data.shards import first_sequences
from rldecoder.decoder.blocks import evenly_spaced
from rldecoder.decoder.faithfulness import evaluate_faithfulness, evaluate_predictors
from rldecoder.decoder.frontier import (
    FrontierCell,
    FrontierVerdict,
    flops_per_token,
    linear_start,
    num_parameters,
    recommend,
    residual_predictor,
)
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.start import decoder_from_blocks
from rldecoder.decoder.training import DecoderTrainer
from rldecoder.errors import BadInputError
from rldecoder.figures import svg_figure
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.metrics import random_control
from rldecoder.sae.model import Sae
from rldecoder.sae.splice import splice_quality
from rldecoder.sae.sweep import Setting, SweepCell
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import FrontierInputs

SPLICE_SEQUENCES = 8
DONE_FILE = "cells.json"
"""In the progress folder: cells that are measured."""

Source = Literal["trained", "random"]


class Plan(NamedTuple):
    """A decoder to train."""

    swept: SweepCell
    """Its SAE in the sweep."""
    depth: int
    """Its blocks."""
    source: Source
    """Whether it reads that SAE, or a random one like it."""

    @property
    def key(self) -> str:
        """Its name in seeds and in progress."""
        return f"{self.swept.setting.key}/{self.depth}/{self.source}"


def run(inputs: FrontierInputs, config: FrontierConfig, ctx: StageContext) -> Output:
    """Publish every cell, a figure and the verdict; without depths, that none was asked for."""
    seed_everything(ctx.seed)
    if not config.depths:
        none = FrontierVerdict(meets_limit=None, why="no frontier was asked for", depths={})
        Frontier.verdict_record.save(ctx.out, none)
        return Output({"cells": 0})
    lm = inputs.model.load(ctx.device)
    plan = _plan(inputs.sweep, lm, config)
    tokens = {
        split: first_sequences(inputs.corpus.folder, split, budget, at_least=8)
        for split, budget in (("train", config.train_tokens), ("test", config.test_tokens))
    }

    done = {
        key: FrontierCell.model_validate(cell)
        for key, cell in sealed.read_or(
            ctx.progress / DONE_FILE, {}, owner=ctx.owner, note=ctx.report.note
        ).items()
    }
    with ctx.report.track("frontier", len(plan), "decoders", len(done)) as bar:
        for layer, group in itertools.groupby(plan, key=lambda item: item.swept.layer):
            # Activations are computed only for a layer that has a cell to do, and kept no longer.
            shared: _Layer | None = None
            for item in group:
                if item.key in done:
                    continue
                if shared is None:
                    shared = _Layer(lm, layer, tokens, config, ctx)
                sae = inputs.sweep.load(item.swept.setting, ctx.device)
                cell = _cell(shared, sae, item, derive_seed(ctx.seed, item.key))
                done[item.key] = cell
                sealed.write(
                    ctx.progress / DONE_FILE,
                    {key: value.model_dump(mode="json") for key, value in done.items()},
                    owner=ctx.owner,
                )
                bar.advance(1, note=f"layer {layer}, {item.depth} blocks: KL {cell.kl:.2f}")
            shutil.rmtree(ctx.progress / f"cache-{layer}", ignore_errors=True)

    cells = [done[item.key] for item in plan]
    trained = [cell for cell in cells if cell.sae == "trained"]
    verdict = recommend(trained, config.max_kl)
    Frontier.cells.save_rows(ctx.out, [dict(cell) for cell in cells])
    Frontier.verdict_record.save(ctx.out, verdict)
    _figure(cells, config, Frontier.figure.path(ctx.out))
    ctx.report.note(f"frontier: {verdict.why}")
    least = min(cell.kl for cell in trained)
    return Output({"cells": len(cells), "least_kl": least} | verdict.headline)


def _plan(sweep: Sweep, lm: FrozenLM, config: FrontierConfig) -> list[Plan]:
    """Every decoder to train, layer by layer.

    Raises:
        BadInputError: a layer has fewer blocks above it than a decoder is to have.
    """
    assert sweep.cells is not None, "a run with a frontier has a sweep"
    swept = [SweepCell(**row) for row in sweep.cells.to_pylist()]
    swept = [
        cell
        for cell in swept
        if (config.layers is None or cell.layer in config.layers)
        and (config.ks is None or cell.k in config.ks)
    ]
    deepest = max(config.depths)
    above = lm.num_layers - max(cell.layer for cell in swept)
    if deepest > above:
        raise BadInputError(
            f"`frontier.depths` is {list(config.depths)}.",
            f"Above the last of the layers there are {above} blocks to start from.",
            f"Give depths from 0 to {above}, or leave the later layers out of `frontier.layers`.",
        )

    # The control is costly, and tells most where the decoder can do most by itself.
    return [
        plan
        for cell in swept
        for plan in (
            *(Plan(cell, depth, "trained") for depth in config.depths),
            Plan(cell, deepest, "random"),
        )
    ]


class _Layer:
    """What all decoders at one layer share: its activations, and the lens on the bare residual."""

    def __init__(
        self,
        lm: FrozenLM,
        layer: int,
        tokens: Mapping[str, Tensor],
        config: FrontierConfig,
        ctx: StageContext,
    ) -> None:
        self.lm, self.layer, self.tokens, self.config = lm, layer, tokens, config

        # Shards that an earlier, killed run left are of no use: no seal says that they are whole.
        folder = ctx.progress / f"cache-{layer}"
        shutil.rmtree(folder, ignore_errors=True)
        length = tokens["train"].shape[1]
        meta = ActivationMeta(
            model_name="frontier",
            hook_layer=layer,
            num_layers=lm.num_layers,
            d_model=lm.d_model,
            vocab_size=lm.vocab_size,
            context_length=length,
        )
        forward = ActivationPass(lm, layer, config.micro_batch_sequences, ctx.report.note)
        total = sum(ids.numel() for ids in tokens.values())
        with ctx.report.track(f"frontier: layer {layer}", total, "tokens") as bar:
            for split, ids in tokens.items():
                # One shard a split: readers expect whole sequences in a shard.
                with ActivationWriter(folder, split, meta, shard_rows=ids.numel() + 1) as writer:
                    batch = forward.shard(ids, 0, bar.advance)
                    assert batch.resid is not None
                    assert batch.final_hidden is not None
                    writer.add(
                        batch.seq_id, batch.pos, batch.token_id, batch.resid, batch.final_hidden
                    )

        self.train, self.test = (ActivationReader(folder, split) for split in ("train", "test"))
        lens = residual_predictor(lm, self.train)
        precision = config.training.matmul_precision
        found = evaluate_predictors({"lens": lens}, self.test, lm, precision=precision)
        self.residual_lens_kl = found["lens"].kl

    def start(self, sae: Sae, depth: int) -> SaeDecoderForCausalLM:
        """The decoder before training."""
        if depth == 0:
            return linear_start(self.lm, sae, self.train)
        blocks = evenly_spaced(self.layer, self.lm.num_layers, depth)
        training = self.config.training
        length = self.tokens["train"].shape[1]
        ids = self.tokens["train"][: max(8, training.fit_tokens // length)]
        return decoder_from_blocks(self.lm, sae, blocks, ids, init=training.init)


def _cell(shared: _Layer, sae: Sae, plan: Plan, seed: int) -> FrontierCell:
    """Train one decoder and measure it."""
    seed_everything(seed)
    swept = plan.swept
    if plan.source == "random":
        sample = next(shared.train.ordered(4096)).resid
        assert sample is not None
        sae = random_control(
            sae.spec, derive_seed(seed, "sae"), sample.to(shared.lm.device), swept.l0
        )

    # What training adds is told from what the start gives for nothing.
    decoder = shared.start(sae, plan.depth)
    precision = shared.config.training.matmul_precision
    before = evaluate_faithfulness(decoder, shared.test, precision=precision)

    trainer = DecoderTrainer(decoder, shared.train, shared.config.training, seed)
    started = time.monotonic()
    while trainer.step_done < trainer.total_steps:
        for batch in trainer.rest_of_epoch():
            trainer.step(batch)
    seconds = time.monotonic() - started

    after = evaluate_faithfulness(decoder, shared.test, precision=precision)
    sequences = shared.tokens["test"][:SPLICE_SEQUENCES]
    splice = splice_quality(
        shared.lm, sequences, shared.layer, {"sae": lambda resid: sae(resid.float()).recon}
    )
    return FrontierCell(
        layer=shared.layer,
        k=swept.k,
        expansion=swept.expansion,
        depth=plan.depth,
        sae=plan.source,
        start_kl=before.kl,
        kl=after.kl,
        kl_low=after.kl_low,
        kl_high=after.kl_high,
        agreement=after.agreement,
        splice_kl=splice.replaced["sae"].kl,
        residual_lens_kl=shared.residual_lens_kl,
        parameters=num_parameters(decoder),
        flops_per_token=flops_per_token(decoder, swept.l0, shared.tokens["train"].shape[1]),
        tokens_trained=trainer.tokens_done,
        train_seconds=seconds,
    )


def _figure(cells: Sequence[FrontierCell], config: FrontierConfig, path: Path) -> None:
    """KL by depth, a line for each layer; the floor of each dotted, its random SAE a cross."""
    lines: dict[Setting, list[FrontierCell]] = {}
    for cell in cells:
        lines.setdefault(Setting(cell.layer, cell.k, cell.expansion), []).append(cell)

    colours = mpl.colormaps["viridis"]
    with svg_figure(path, (6.4, 3.8)) as figure:
        axes = figure.subplots()
        for index, (line, own) in enumerate(sorted(lines.items())):
            trained = sorted((c for c in own if c.sae == "trained"), key=lambda c: c.depth)
            colour = colours(0.9 * index / max(1, len(lines) - 1))
            axes.plot(
                [cell.depth for cell in trained], [cell.kl for cell in trained],
                marker="o", color=colour,
                label=f"layer {line.layer}, k {line.k}, {line.expansion:g}x",
            )  # fmt: skip
            axes.axhline(trained[0].splice_kl, color=colour, ls=":", lw=1)
            for cell in own:
                if cell.sae == "random":
                    axes.plot(cell.depth, cell.kl, marker="x", color=colour)

        # The limit that the verdict asks for.
        axes.axhline(config.max_kl, color="#999999", ls="--", lw=1)
        axes.set(xlabel="blocks of the decoder", ylabel="KL(frozen || decoder), nats per token")
        axes.set_xticks(sorted(config.depths))
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")

"""How faithful a decoder can be from each layer: train one for every layer, k and depth.

In: model, tokens, the sweep's SAEs. Out: `frontier.parquet`, `frontier.svg`, `verdict.json` (whose
`depths` `train_decoder.depth: auto` follows). A killed run goes on with the cells not yet measured.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from torch import Tensor

from rldecoder.artifacts import sealed
from rldecoder.config.decoder import FrontierConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationMeta, ActivationWriter
from rldecoder.data.forward import ActivationPass
from rldecoder.data.shards import read_tokens
from rldecoder.decoder.blocks import evenly_spaced
from rldecoder.decoder.faithfulness import evaluate_faithfulness, evaluate_predictors
from rldecoder.decoder.frontier import (
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
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.metrics import random_control
from rldecoder.sae.model import Sae
from rldecoder.sae.splice import splice_quality
from rldecoder.sae.sweep import sae_folder
from rldecoder.schemas import read_parquet, write_json, write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

CELLS = pa.schema(
    [
        ("layer", pa.int32()),
        ("k", pa.int32()),
        ("expansion", pa.float64()),
        ("depth", pa.int32()),
        ("sae", pa.string()),
        ("start_kl", pa.float64()),
        ("kl", pa.float64()),
        ("kl_low", pa.float64()),
        ("kl_high", pa.float64()),
        ("agreement", pa.float64()),
        ("splice_kl", pa.float64()),
        ("residual_lens_kl", pa.float64()),
        ("parameters", pa.int64()),
        ("flops_per_token", pa.float64()),
        ("tokens_trained", pa.int64()),
        ("train_seconds", pa.float64()),
    ]
)
"""`frontier.parquet`: a row a decoder; `sae` is trained or random; KL in nats per token on test."""

SPLICE_SEQUENCES = 8


def run(
    inputs: Mapping[str, InputArtifact], config: FrontierConfig, ctx: StageContext
) -> StageOutput:
    """Publish every cell, a figure and the verdict; without depths, that none was asked for."""
    seed_everything(ctx.seed)
    if not config.depths:
        why = "no frontier was asked for"
        write_json(ctx.out / "verdict.json", {"meets_limit": None, "why": why, "depths": {}})
        return StageOutput({"cells": 0})
    sweep = inputs["sweep_sae"].path
    offered = read_parquet(sweep / "sweep.parquet").to_pylist()
    saes = [
        row
        for row in offered
        if (config.layers is None or row["layer"] in config.layers)
        and (config.ks is None or row["k"] in config.ks)
    ]
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    _check_depths(config, saes, lm)
    tokens = {
        split: _sequences(inputs["ingest"].path, split, budget)
        for split, budget in (("train", config.train_tokens), ("test", config.test_tokens))
    }
    done_path = ctx.progress / "cells.json"
    done: dict[str, dict[str, Any]] = sealed.read_or(
        done_path, {}, owner=ctx.owner, note=ctx.report.note
    )
    plan = [(row, *cell) for row in saes for cell in _cells(config)]
    with ctx.report.track("frontier", len(plan), "decoders", len(done)) as bar:
        for layer, group in itertools.groupby(plan, key=lambda item: int(item[0]["layer"])):
            room: _Layer | None = None
            for row, depth, source in group:
                key = f"{layer}/{row['k']}/{row['expansion']:g}/{depth}/{source}"
                if key in done:
                    continue
                if room is None:
                    room = _Layer(lm, layer, tokens, config, ctx)
                sae = _sae(sweep, row, ctx.device)
                done[key] = _cell(room, sae, row, depth, source, derive_seed(ctx.seed, key))
                sealed.write(done_path, done, owner=ctx.owner)
                bar.advance(1, note=f"layer {layer}, {depth} blocks: KL {done[key]['kl']:.2f}")
            shutil.rmtree(ctx.progress / f"cache-{layer}", ignore_errors=True)

    rows = [done[f"{r['layer']}/{r['k']}/{r['expansion']:g}/{d}/{s}"] for r, d, s in plan]
    verdict = recommend([row for row in rows if row["sae"] == "trained"], config.max_kl)
    columns = {name: [row[name] for row in rows] for name in CELLS.names}
    write_parquet(ctx.out / "frontier.parquet", columns, CELLS)
    write_json(ctx.out / "verdict.json", verdict)
    _figure(rows, config, ctx.out / "frontier.svg")
    ctx.report.note(f"frontier: {verdict['why']}")
    best = min(row["kl"] for row in rows if row["sae"] == "trained")
    return StageOutput(
        {"cells": len(rows), "least_kl": best, **{n: verdict[n] for n in ("layer", "depth")}}
    )


def _sae(sweep: Path, row: Mapping[str, Any], device: torch.device) -> Sae:
    folder = sweep / sae_folder(row["layer"], row["k"], row["expansion"])
    return Sae.load(folder, device=device)


def _cells(config: FrontierConfig) -> list[tuple[int, str]]:
    """(depth, SAE) of every decoder at one of the sweep's SAEs."""
    return [*((depth, "trained") for depth in config.depths), (max(config.depths), "random")]


def _check_depths(config: FrontierConfig, saes: Sequence[Mapping[str, Any]], lm: FrozenLM) -> None:
    room = lm.num_layers - max(row["layer"] for row in saes)
    if max(config.depths) > room:
        raise BadInputError(
            f"`frontier.depths` is {list(config.depths)}.",
            f"Above the last of the layers there are {room} blocks to start from.",
            f"Give depths from 0 to {room}, or leave the later layers out of `frontier.layers`.",
        )


def _sequences(ingest: Path, split: str, num_tokens: int) -> Tensor:
    length = read_tokens(ingest, split, 1).shape[1]
    return torch.from_numpy(read_tokens(ingest, split, max(8, num_tokens // length)))


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


def _cell(
    room: _Layer, sae: Sae, row: Mapping[str, Any], depth: int, source: str, seed: int
) -> dict[str, Any]:
    """Train one decoder and measure it."""
    seed_everything(seed)
    if source == "random":
        sample = next(room.train.ordered(4096)).resid
        assert sample is not None
        sae = random_control(
            sae.spec, derive_seed(seed, "sae"), sample.to(room.lm.device), row["l0"]
        )
    decoder = room.start(sae, depth)
    precision = room.config.training.matmul_precision
    before = evaluate_faithfulness(decoder, room.test, precision=precision)
    trainer = DecoderTrainer(decoder, room.train, room.config.training, seed)
    started = time.monotonic()
    while trainer.step_done < trainer.total_steps:
        for batch in trainer.rest_of_epoch():
            trainer.step(batch)
    seconds = time.monotonic() - started
    after = evaluate_faithfulness(decoder, room.test, precision=precision)
    sequences = room.tokens["test"][:SPLICE_SEQUENCES]
    splice = splice_quality(
        room.lm, sequences, room.layer, {"sae": lambda resid: sae(resid.float()).recon}
    )
    return {
        "layer": room.layer,
        "k": row["k"],
        "expansion": row["expansion"],
        "depth": depth,
        "sae": source,
        "start_kl": before.kl,
        "kl": after.kl,
        "kl_low": after.kl_low,
        "kl_high": after.kl_high,
        "agreement": after.agreement,
        "splice_kl": splice.replaced["sae"].kl,
        "residual_lens_kl": room.residual_lens_kl,
        "parameters": num_parameters(decoder),
        "flops_per_token": flops_per_token(decoder, row["l0"], room.tokens["train"].shape[1]),
        "tokens_trained": trainer.tokens_done,
        "train_seconds": seconds,
    }


def _figure(rows: Sequence[Mapping[str, Any]], config: FrontierConfig, path: Path) -> None:
    """KL by depth, a line for each layer; the floor of each dotted, its random SAE a cross."""
    with mpl.rc_context({"svg.hashsalt": "rldecoder", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        lines = sorted({(row["layer"], row["k"], row["expansion"]) for row in rows})
        colours = mpl.colormaps["viridis"]
        for index, line in enumerate(lines):
            own = [row for row in rows if (row["layer"], row["k"], row["expansion"]) == line]
            trained = sorted((r for r in own if r["sae"] == "trained"), key=lambda r: r["depth"])
            colour = colours(0.9 * index / max(1, len(lines) - 1))
            axes.plot(
                [row["depth"] for row in trained], [row["kl"] for row in trained],
                marker="o", color=colour, label=f"layer {line[0]}, k {line[1]}, {line[2]:g}x",
            )  # fmt: skip
            axes.axhline(trained[0]["splice_kl"], color=colour, ls=":", lw=1)
            for row in own:
                if row["sae"] == "random":
                    axes.plot(row["depth"], row["kl"], marker="x", color=colour)
        axes.axhline(config.max_kl, color="#999999", ls="--", lw=1)
        axes.set(xlabel="blocks of the decoder", ylabel="KL(frozen || decoder), nats per token")
        axes.set_xticks(sorted(config.depths))
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")
        figure.savefig(path, format="svg", metadata={"Date": None})

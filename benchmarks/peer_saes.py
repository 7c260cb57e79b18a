"""An SAE by another library on a run's cached activations, in that library's own folder.

    python -m benchmarks.peer_saes sae_lens artifacts/cache_activations/<digest> peers/sae_lens
    PYTHONPATH=PACKAGES python -m benchmarks.peer_saes sparsify CACHE peers/layers.23
    python -m benchmarks.peer_saes random CACHE peers/random

The defaults are the quickstart's: width, k, batch, steps. All read the same batches in the same
order, as benchmarks/bench_sae.py gives them. `train_sae.pretrained.folder` reads what is written.
How to get sparsify: benchmarks/sae_peers.py.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.bench_sae import Cached, fvu
from benchmarks.sae_peers import Problem, SaeLens, Sparsify
from rldecoder.config.sae import PretrainedSae
from rldecoder.data.activations import ActivationMeta
from rldecoder.sae.fit import described
from rldecoder.sae.folders import recognise
from rldecoder.sae.interop import fold_rescaling
from rldecoder.sae.metrics import random_control
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.pretrained import read_weights

RATES = {"sae_lens": 4.5e-3, "sparsify": 1e-2}
"""Chosen on validation tokens of this kind (docs/experiments/2026-11-29-sae-training.md)."""


def main(
    library: Annotated[str, typer.Argument(help="sae_lens, sparsify or random.")],
    activations: Annotated[Path, typer.Argument(help="A cache_activations artifact.")],
    out: Annotated[Path, typer.Argument(help="A new folder; for sparsify named layers.N.")],
    tokens: Annotated[int, typer.Option(help="Visits of training tokens.")] = 900_000,
    num_latents: int = 5760,
    k: int = 64,
    batch_tokens: int = 2048,
    threads: int = 1,
    autocast: Annotated[bool, typer.Option(help="sae_lens's own setting: bfloat16.")] = False,
) -> None:
    """Train one SAE, save it, read it back as this project does, and compare the two."""
    if library not in (*RATES, "random"):
        raise typer.BadParameter(f"library is sae_lens, sparsify or random, not {library!r}")
    if autocast and library != "sae_lens":
        raise typer.BadParameter("autocast is a setting of sae_lens")
    torch.set_num_threads(threads)
    data = Cached(activations)
    meta = ActivationMeta.model_validate_json((activations / "meta.json").read_bytes())
    num_steps = tokens // batch_tokens
    spec = SaeSpec(
        d_model=data.d_model, num_latents=num_latents, k=k, hook_layer=meta.hook_layer,
        model_name=meta.model_name, context_length=meta.context_length,
    )  # fmt: skip

    # The start of b_dec, and the random control's gain, come from the first tokens read.
    sample = torch.cat(list(itertools.islice(data.batches(batch_tokens), 16_384 // batch_tokens)))
    if library == "random":
        random_control(spec, 0, sample / data.scale, k).save(out)
        return

    problem = Problem(
        data.d_model, num_latents, k, batch_tokens, num_steps, sample, RATES[library]
    )  # fmt: skip
    torch.manual_seed(0)
    contender: SaeLens | Sparsify
    if library == "sae_lens":
        contender = SaeLens(problem, "topk", autocast)
    else:
        contender = Sparsify(problem, "adam")
    started = time.perf_counter()
    for index, x in enumerate(itertools.islice(data.batches(batch_tokens), num_steps), 1):
        contender.step(x)
        if index % 20 == 0:
            print(f"step {index} of {num_steps}, {time.perf_counter() - started:.0f} s", flush=True)

    # What it learned on scaled inputs must hold for raw ones, and after another program read it.
    x = data.held_out
    expected, _ = contender.reconstruct(x)
    unexplained = fvu(contender, x)[0]  # before saving, which rescales the biases in place
    contender.save(out, data.scale, spec.hook_name)
    with torch.no_grad():
        recon = _read_back(out, spec)(x / data.scale).recon * data.scale
    gap = float((recon - expected).norm() / expected.norm())
    print(f"test fvu {unexplained:.4f}; read back, it differs by {gap:.1e}")


def _read_back(folder: Path, spec: SaeSpec) -> Sae:
    """The SAE that a run with `train_sae.pretrained.folder` would take."""
    found = recognise(folder, PretrainedSae(folder=folder).stated)
    weights = read_weights(found, described(found), spec.model_name)
    sae = Sae(weights.spec)
    sae.load_state_dict(fold_rescaling(weights.tensors) if weights.rescaled else weights.tensors)
    return sae


if __name__ == "__main__":
    typer.run(main)

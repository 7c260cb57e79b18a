"""delphi's latent cache: what its `LatentDataset` reads in place of running the model.

    <folder>/<hookpoint>/<first>_<last>.safetensors
        locations [n, 3] uint32: row of `tokens`, position in it, latent minus <first>
        activations [n] float32
        tokens [rows, context] int64
    <folder>/<hookpoint>/config.json

Format: `delphi.latents` of eai-delphi 0.1.3. delphi itself writes float16; its reader takes what
it finds, and float32 is exact.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rldecoder.errors import BadInputError
from rldecoder.interp.corpus import SplitFirings
from rldecoder.schemas import write_json


def hookpoint(hook_layer: int) -> str:
    """The module whose output the SAE reads, in delphi's (and sparsify's) words.

    Raises:
        BadInputError: the SAE reads the embeddings, which are no block's output.
    """
    if hook_layer == 0:
        raise BadInputError(
            "delphi has no name for layer 0.",
            "Its hook points are modules, and the residual before the first block is the output "
            "of none.",
            "Export the features of an SAE on a later layer.",
        )
    return f"layers.{hook_layer - 1}"


def write(
    folder: Path,
    split: SplitFirings,
    *,
    hook_layer: int,
    num_latents: int,
    model: str,
    dataset: str,
    pad_token: int,
    num_splits: int = 5,
) -> Path:
    """Write the cache of one hook point; returns its folder.

    Args:
        split: firings of any latents; others count as silent.
        num_latents: size of the dictionary, cut into `num_splits` ranges of ids. A range without
            any firing gets no file: delphi cannot read an empty one.
        model: name or folder from which delphi loads the tokenizer.
        pad_token: stands for tokens that are not known (after a text's end).
    """
    target = folder / hookpoint(hook_layer)
    target.mkdir(parents=True, exist_ok=True)

    grid, firings = split
    tokens = np.where(grid.tokens >= 0, grid.tokens, pad_token).astype(np.int64)
    found = firings.matrix.tocoo()
    latent = firings.latents[found.row]
    row, position = np.divmod(found.col.astype(np.int64), grid.num_positions)
    # delphi expects cells in reading order.
    order = np.lexsort((latent, position, row))
    latent, row, position = latent[order], row[order], position[order]
    acts = found.data[order].astype(np.float32)

    bounds = np.linspace(0, num_latents, num_splits + 1).astype(int)
    for first, after in pairwise(bounds.tolist()):
        inside = (latent >= first) & (latent < after)
        if not inside.any():
            continue
        places = np.stack([row, position, latent - first], 1)[inside].astype(np.uint32)
        save_file(
            {"locations": places, "activations": acts[inside], "tokens": tokens},
            target / f"{first}_{after - 1}.safetensors",
        )

    config = {
        "dataset_repo": dataset,
        "dataset_split": grid.split,
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": grid.num_positions,
        "n_tokens": int(tokens.size),
        "n_splits": num_splits,
        "model_name": model,
    }
    write_json(target / "config.json", config)
    return target

"""Tiny inputs for the decoder stages: model, cache, SAE and affine lens as artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from rldecoder.artifacts.catalogue import Baselines, Frontier, ModelFolder, TrainedSae
from rldecoder.data.activations import ActivationWriter
from rldecoder.data.packing import PackedSequence, TokenShardWriter
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.schemas import write_json
from rldecoder.seeds import torch_generator
from rldecoder.stages.inputs import DecoderInputs
from tests.stages.published import inputs_in
from tests.tiny_models import cache_meta

HOOK_LAYER = 2
LENGTH = 16


def make_inputs(folder: Path, model_folder: Path) -> DecoderInputs:
    """Artifacts below `folder/<stage>` that the decoder stages read, built without their stages."""
    inputs = inputs_in(DecoderInputs, folder)
    shutil.copytree(model_folder, ModelFolder.model.path(inputs.model.folder))
    lm = inputs.model.load()
    meta = cache_meta(lm, HOOK_LAYER, LENGTH)
    for split, num_sequences in (("train", 20), ("validation", 6), ("test", 6), ("ood", 4)):
        generator = torch_generator(0, split)
        input_ids = torch.randint(lm.vocab_size, (num_sequences, LENGTH), generator=generator)
        resid, final_hidden = lm.resid_and_final(input_ids, HOOK_LAYER)
        grid = torch.meshgrid(torch.arange(num_sequences), torch.arange(1, LENGTH), indexing="ij")
        with ActivationWriter(inputs.cache.folder, split, meta, shard_rows=105) as writer:
            writer.add(
                grid[0].flatten(),
                grid[1].flatten(),
                input_ids[:, 1:].flatten(),
                resid[:, 1:].flatten(0, 1),
                final_hidden[:, 1:].flatten(0, 1),
            )
    spec = SaeSpec(d_model=lm.d_model, num_latents=96, k=16, hook_layer=HOOK_LAYER)
    Sae.random_init(spec, seed=1).save(TrainedSae.sae.path(inputs.sae.folder))
    inputs.baselines.folder.mkdir()
    save_file(
        {f"A.{HOOK_LAYER}": torch.eye(lm.d_model), f"c.{HOOK_LAYER}": torch.zeros(lm.d_model)},
        Baselines.affine_lens.path(inputs.baselines.folder),
    )
    inputs.corpus.folder.mkdir()
    writer = TokenShardWriter(inputs.corpus.folder, "train", lm.vocab_size, 100)
    ids = torch.randint(lm.vocab_size, (20, LENGTH), generator=torch_generator(0, "train"))
    writer.add([PackedSequence("s", [0], [0], row) for row in ids.numpy()])
    writer.close()
    inputs.frontier.folder.mkdir()
    write_json(
        Frontier.verdict_record.path(inputs.frontier.folder),
        {"meets_limit": None, "why": "a test's", "depths": {str(HOOK_LAYER): 1}},
    )
    return inputs

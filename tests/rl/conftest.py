"""Tiny decoders and rollouts for the RL tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from rldecoder.data.activations import ActivationWriter
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.seeds import torch_generator
from tests.tiny_models import cache_meta

HOOK_LAYER = 2


@pytest.fixture(scope="session")
def make_decoder(tiny_lm_dir: Path) -> Callable[..., SaeDecoderForCausalLM]:
    """A factory of identical decoders (W random) on the tiny GPT-2."""
    lm = FrozenLM.load(tiny_lm_dir)

    def make(
        *, scale: float = 0.02, folder: Path | None = None, blocks: Sequence[int] = ()
    ) -> SaeDecoderForCausalLM:
        frozen = lm if folder is None else FrozenLM.load(folder)
        spec = SaeSpec(d_model=frozen.d_model, num_latents=96, k=16, hook_layer=HOOK_LAYER)
        decoder = new_decoder(frozen, Sae.random_init(spec, seed=1), blocks)
        if decoder.looks_back:
            decoder.blocks.copy_from(frozen.base)
        with torch.no_grad():
            start = torch.randn(decoder.W.shape, generator=torch_generator(0, "W"))
            decoder.W.copy_(scale * start)
            decoder.b.zero_()
        return decoder

    return make


@pytest.fixture(scope="session")
def tiny_cache(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An activation cache of random tokens: train, validation and test."""
    folder = tmp_path_factory.mktemp("cache")
    lm = FrozenLM.load(tiny_lm_dir)
    length = 16
    meta = cache_meta(lm, HOOK_LAYER, length)
    for split, num_sequences in (("train", 12), ("validation", 6), ("test", 6)):
        ids = torch.randint(
            lm.vocab_size, (num_sequences, length), generator=torch_generator(0, split)
        )
        resid, final = lm.resid_and_final(ids, HOOK_LAYER)
        seq, pos = torch.meshgrid(
            torch.arange(num_sequences), torch.arange(1, length), indexing="ij"
        )
        with ActivationWriter(folder, split, meta, shard_rows=64) as writer:
            writer.add(
                seq.flatten(),
                pos.flatten(),
                ids[:, 1:].flatten(),
                resid[:, 1:].flatten(0, 1),
                final[:, 1:].flatten(0, 1),
            )
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path, str], Path]:
    """Copy a folder into the test's own."""

    def copy(folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy

"""A tiny frozen model with a random SAE, an affine lens, a decoder and a small cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationWriter
from rldecoder.decoder.loading import AffineLens, decoder_from_lens
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.seeds import torch_generator
from tests.tiny_models import cache_meta

HOOK_LAYER = 2


@pytest.fixture(scope="session")
def lm(tiny_lm_dir: Path) -> FrozenLM:
    return FrozenLM.load(tiny_lm_dir)


@pytest.fixture(scope="session")
def llama(tiny_llama_dir: Path) -> FrozenLM:
    return FrozenLM.load(tiny_llama_dir)


@pytest.fixture(scope="session")
def sae() -> Sae:
    spec = SaeSpec(d_model=64, num_latents=96, k=8, hook_layer=HOOK_LAYER)
    return Sae.random_init(spec, seed=1, mean=torch.full((64,), 0.01))


@pytest.fixture(scope="session")
def lens() -> AffineLens:
    generator = torch_generator(3, "lens")
    return AffineLens(
        torch.eye(64) + 0.1 * torch.randn(64, 64, generator=generator),
        0.1 * torch.randn(64, generator=generator),
    )


@pytest.fixture
def decoder(lm: FrozenLM, sae: Sae, lens: AffineLens) -> SaeDecoderForCausalLM:
    return decoder_from_lens(lm, sae, lens)


@pytest.fixture(scope="session")
def reader(lm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> ActivationReader:
    """Six sequences of 16 tokens, ids from 40; the last one is cut after position 9."""
    folder = tmp_path_factory.mktemp("cache")
    meta = cache_meta(lm, HOOK_LAYER, 16)
    input_ids = torch.randint(lm.vocab_size, (6, 16), generator=torch_generator(5, "ids"))
    resid, final_hidden = lm.resid_and_final(input_ids, HOOK_LAYER)
    with ActivationWriter(folder, "test", meta, shard_rows=37) as writer:
        for row in range(6):
            stop = 10 if row == 5 else 16
            writer.add(
                torch.full((stop - 1,), 40 + row),
                torch.arange(1, stop),
                input_ids[row, 1:stop],
                resid[row, 1:stop],
                final_hidden[row, 1:stop],
            )
    return ActivationReader(folder, "test")

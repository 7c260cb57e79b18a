"""A tiny frozen model with a random SAE and a decoder that reads through a fitted lens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationWriter
from rldecoder.decoder.loading import AffineLens, decoder_from_lens
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.explainer import Explainer, ExplainerSpec
from rldecoder.explain.pairs import Pairs, PairSettings, make_pairs
from rldecoder.explain.positions import Positions, positions_from_cache
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.seeds import torch_generator
from tests.tiny_models import cache_meta

HOOK_LAYER = 2
NUM_LATENTS = 160
K = 12
CANDIDATES = 8
SETTINGS = PairSettings(candidates=CANDIDATES, interventions=3, probes=8, seed=0)


def split_tokens(split: str) -> torch.Tensor:
    """[8, 24] tokens of a split of the cache."""
    return torch.randint(512, (8, 24), generator=torch_generator(5, split))


def text_positions(
    decoder: SaeDecoderForCausalLM, cache: Path, split: str, count: int
) -> Positions:
    """Positions of cached text, with what came before them."""
    return positions_from_cache(
        ActivationReader(cache, split), decoder, count, seed=0, per_text=8,
        tokens=split_tokens(split).numpy(),
    )  # fmt: skip


@pytest.fixture(scope="session")
def lm(tiny_lm_dir: Path) -> FrozenLM:
    return FrozenLM.load(tiny_lm_dir)


@pytest.fixture(scope="session")
def cache(lm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits `label` and `test`, 8 sequences of 24 random tokens each."""
    folder = tmp_path_factory.mktemp("explain-cache")
    meta = cache_meta(lm, HOOK_LAYER, 24)
    for split in ("label", "test"):
        ids = split_tokens(split)
        resid, final_hidden = lm.resid_and_final(ids, HOOK_LAYER)
        with ActivationWriter(folder, split, meta, shard_rows=92) as writer:
            for row in range(8):
                writer.add(
                    torch.full((23,), row),
                    torch.arange(1, 24),
                    ids[row, 1:],
                    resid[row, 1:],
                    final_hidden[row, 1:],
                )
    return folder


@pytest.fixture(scope="session")
def sae() -> Sae:
    spec = SaeSpec(d_model=64, num_latents=NUM_LATENTS, k=K, hook_layer=HOOK_LAYER)
    return Sae.random_init(spec, seed=1)


@pytest.fixture(scope="session")
def decoder(lm: FrozenLM, sae: Sae, cache: Path) -> SaeDecoderForCausalLM:
    reader = ActivationReader(cache, "label")
    batch = next(reader.ordered(1000, columns=("resid", "final_hidden")))
    assert batch.resid is not None
    assert batch.final_hidden is not None
    x, y = batch.resid.float(), batch.final_hidden.float()
    A = torch.linalg.solve(x.T @ x + torch.eye(64), x.T @ y)
    return decoder_from_lens(lm, sae, AffineLens(A, (y - x @ A).mean(0))).requires_grad_(False)


@pytest.fixture(scope="session")
def pairs(decoder: SaeDecoderForCausalLM, cache: Path) -> dict[str, Pairs]:
    """Pairs of both splits, 8 candidates and 3 interventions a position."""
    return {
        split: make_pairs(
            decoder,
            text_positions(decoder, cache, split, 60),
            SETTINGS._replace(seed=number),
        )
        for number, split in enumerate(("label", "test"))
    }


@pytest.fixture
def explainer(pairs: dict[str, Pairs]) -> Explainer:
    """An untrained explainer in the units of the pairs, without a smallest effect."""
    torch.manual_seed(0)
    unit = float(pairs["label"].measured.single.square().mean().sqrt())
    spec = ExplainerSpec(
        d_model=64,
        num_latents=NUM_LATENTS,
        max_candidates=CANDIDATES,
        max_claims=3,
        width=16,
        num_layers=1,
        effect_unit=unit,
        min_effect=0.0,
    )
    return Explainer(spec).eval()

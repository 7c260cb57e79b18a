"""Where decoders with blocks start, on tiny models of every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rldecoder.decoder.start import decoder_from_blocks
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from tests.tiny_models import ARCHITECTURES, WIDTH, tiny_frozen, whole_decoder

BOS = 7


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest, tiny_lm_dir: Path) -> FrozenLM:
    return tiny_frozen(request.param, tiny_lm_dir, depth=4)


@pytest.fixture(scope="module")
def sae() -> Sae:
    return Sae.random_init(SaeSpec(d_model=WIDTH, num_latents=96, k=8, hook_layer=2), seed=1)


@torch.no_grad()
def test_fitted_start_is_better_than_plain_blocks(lm: FrozenLM, sae: Sae) -> None:
    text = torch.randint(1, 512, (64, 16), generator=torch.Generator().manual_seed(4))
    text[:, 0] = BOS
    fitted = decoder_from_blocks(lm, sae, [3], text)
    plain = whole_decoder(lm, sae, BOS)
    held = torch.randint(1, 512, (16, 16), generator=torch.Generator().manual_seed(5))
    held[:, 0] = BOS
    target = lm.residuals(held)[1]
    error = {}
    for name, decoder in (("fitted", fitted), ("plain", plain)):
        hidden = decoder.hidden(decoder.features(held).latents)
        error[name] = float((hidden - target)[:, 1:].square().mean())
    assert error["fitted"] < error["plain"]
    sink = lm.residuals(held)[0][3][0, 0]
    torch.testing.assert_close(fitted.blocks.sinks[0], sink, atol=1e-4, rtol=1e-4)


def test_fresh_blocks_start_where_they_are_told(lm: FrozenLM, sae: Sae) -> None:
    text = torch.randint(1, 512, (16, 16), generator=torch.Generator().manual_seed(4))
    decoder = decoder_from_blocks(lm, sae, [2, 3], text, init="fresh")
    torch.testing.assert_close(decoder.W.detach(), sae.W_dec.detach())
    theirs = lm.base.state_dict()
    ours = decoder.blocks.body.state_dict()
    shared = [name for name in ours if name in theirs and theirs[name].ndim == 2]
    assert shared
    assert not any(torch.equal(ours[name], theirs[name]) for name in shared)


def test_too_little_text_to_fit_on_is_refused(lm: FrozenLM, sae: Sae) -> None:
    with pytest.raises(BadInputError, match="8 are the least"):
        decoder_from_blocks(lm, sae, [3], torch.ones(7, 16, dtype=torch.long))

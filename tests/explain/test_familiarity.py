"""How far a text is from a run's: against a direct computation, and in words."""

from __future__ import annotations

import pytest
import torch

from rldecoder.explain.checking import TextStates
from rldecoder.explain.familiarity import Familiarity, familiarity
from rldecoder.sae.model import Sae
from rldecoder.sae.spec import SaeSpec


def states(resid: torch.Tensor, sae: Sae) -> TextStates:
    return TextStates(("t",) * len(resid), resid, resid, sae.encode(resid))


def test_the_share_is_error_over_spread_without_sinks() -> None:
    torch.manual_seed(0)
    spec = SaeSpec(d_model=8, num_latents=32, k=4, hook_layer=1, model_name="tiny")
    sae = Sae.random_init(spec, 0, torch.full((8,), 0.1))
    resid = torch.randn(20, 8)
    resid[0] = 0.5
    resid[5] = 500.0  # a sink in the middle, which must not count
    found = familiarity(states(resid, sae), sae, 0.2)
    assert found is not None
    kept = [t for t in range(1, 20) if t != 5]
    read = sae.decode(sae.encode(resid))
    error = sum(float(((resid[t] - read[t]) ** 2).sum()) for t in kept)
    spread = sum(float(((resid[t] - sae.b_dec) ** 2).sum()) for t in kept)
    assert found.fvu == pytest.approx(error / spread, rel=1e-5)
    assert found.num_tokens == 18
    assert familiarity(states(resid[:1], sae), sae, 0.2) is None


@pytest.mark.parametrize(
    ("fvu", "words"),
    [(0.2, "is like what"), (0.35, "somewhat unlike"), (0.9, "claims may mean little")],
)
def test_it_is_said_in_words(fvu: float, words: str) -> None:
    said = Familiarity(fvu, 0.2, 100).said
    assert words in said
    assert f"{fvu:.0%} unexplained here, 20% on the run's held-out text." in said
    assert "rough" not in said
    assert "(3 tokens: a rough sign)" in Familiarity(fvu, 0.2, 3).said

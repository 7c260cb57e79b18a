"""A dictionary in which named latents push named tokens: their claims hold, wrong ones do not."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.explain.explainer import Explainer, Pointers, Slots
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.reading import PromptReader
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from tests.explain.conftest import HOOK_LAYER

PROMPT = "The hat is in the"
FOR, AGAINST, ASIDE = 0, 1, 2
"""Places among the prompt's active latents: one that raises the token, one that lowers it, and one
whose direction the token does not feel."""


@pytest.fixture
def planted(lm: FrozenLM, sae: Sae) -> tuple[SaeDecoderForCausalLM, list[int]]:
    """The decoder that reads the planted dictionary, and the latents in it."""
    ids = torch.tensor([lm.encode_prompt(PROMPT)])
    resid = lm.trunk(ids, HOOK_LAYER).resid[0].float()
    at = resid[-1:].clone().requires_grad_()
    final = lm.tail(torch.cat([resid[:-1], at])[None], HOOK_LAYER)[0, -1]
    (slope,) = torch.autograd.grad(lm.unembed(final).log_softmax(-1).max(), at)
    slope = slope[0] / slope.norm()
    unfelt = torch.randn(len(slope), generator=torch.Generator().manual_seed(0))
    unfelt -= (unfelt @ slope) * slope

    made = Sae(sae.spec)
    made.load_state_dict(sae.state_dict())
    found = made.encode(resid[-1:])
    latents = found.indices[0, found.acts[0].argsort(descending=True)][:3].tolist()
    with torch.no_grad():
        made.W_dec *= 1e-3
        for place, direction in ((FOR, slope), (AGAINST, -slope), (ASIDE, 1e-3 * unfelt)):
            made.W_dec[latents[place]] = direction / float(found.acts.max())
    decoder = new_decoder(lm, made, [])
    with torch.no_grad():
        decoder.W.copy_(made.W_dec)
    return decoder.requires_grad_(False).eval(), latents


def explain(
    lm: FrozenLM, decoder: SaeDecoderForCausalLM, explainer: Explainer, latents: list[int]
) -> Explanation:
    labels = {latents[FOR]: LabelText("raises it", 0.9, True)}
    explainer.spec = explainer.spec.model_copy(update={"min_effect": 0.01})
    explainer.requires_grad_(False)
    return PromptReader(lm, decoder.frozen.sae, decoder, labels, explainer).explain(PROMPT)


def test_claims_about_planted_latents_are_supported(
    lm: FrozenLM, planted: tuple[SaeDecoderForCausalLM, list[int]], explainer: Explainer
) -> None:
    decoder, latents = planted
    found = explain(lm, decoder, explainer, latents)
    claims = {checked.claim.latent: checked for checked in found.claims}
    assert set(claims) == {latents[FOR], latents[AGAINST]}
    assert claims[latents[FOR]].claim.direction == "supports"
    assert claims[latents[AGAINST]].claim.direction == "opposes"
    for checked in claims.values():
        assert checked.verdict == "supported"
        assert checked.claim.output_token == found.frozen.token
    assert "“raises it”" in found.method_b
    assert "One feature speaks for it, one feature speaks against it" in found.method_b
    assert "2 of 2 claims hold" in found.tested


def test_claims_of_a_liar_are_contradicted(
    lm: FrozenLM,
    planted: tuple[SaeDecoderForCausalLM, list[int]],
    explainer: Explainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, latents = planted
    honest = explainer.forward

    def lying(slots: Slots) -> Pointers:
        found = honest(slots)
        return found._replace(effects=-found.effects)

    monkeypatch.setattr(explainer, "forward", lying)
    found = explain(lm, decoder, explainer, latents)
    assert {checked.claim.latent for checked in found.claims} == {latents[FOR], latents[AGAINST]}
    assert {checked.verdict for checked in found.claims} == {"contradicted"}
    assert "0 of 2 claims hold" in found.tested


def test_a_claim_about_what_does_nothing_is_too_small_to_tell(
    lm: FrozenLM,
    planted: tuple[SaeDecoderForCausalLM, list[int]],
    explainer: Explainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, latents = planted
    honest = explainer.forward

    def boasting(slots: Slots) -> Pointers:
        found = honest(slots)
        return found._replace(
            effects=torch.ones_like(found.effects) * slots.mask,
            sure=torch.ones_like(found.sure),
            logits=-slots.attributions.abs(),
        )

    monkeypatch.setattr(explainer, "forward", boasting)
    found = explain(lm, decoder, explainer, latents)
    assert len(found.claims) == explainer.spec.max_claims
    assert {checked.verdict for checked in found.claims} == {"too small to tell"}

"""A reading answers everything from one pass; its interventions are whole reruns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.reading import PromptReader, Reading
from rldecoder.explain.steering import Changes
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SparseLatents

PROMPT = "The import statement finds a module and then"


@pytest.fixture
def reading(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> Reading:
    explainer.heads.bias.data[1] = 50.0  # sure of everything
    labels = {latent: LabelText(f"a label {latent}", 0.5, latent % 2 == 0) for latent in range(160)}
    return PromptReader(lm, sae, decoder, labels, explainer).read(PROMPT)


def kl(before: Tensor, after: Tensor) -> list[float]:
    return (before.exp() * (before - after)).sum(-1).tolist()


def test_a_prompt_runs_the_trunk_once(
    lm: FrozenLM, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The features of a random SAE are random directions: none would beat the noise floor.
    monkeypatch.setattr(
        "rldecoder.explain.explainer.noise_floor",
        lambda candidates, _: torch.zeros_like(candidates.acts),
    )
    runs: list[int] = []
    handle = lm.part_after(0).register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        again = reading.reader.read(PROMPT)
        assert again.predictions
        latent = again.features(-1)[0].latent
        assert again.ablate(latent, -1).frozen.effect != 0
        assert again.ablate(latent).frozen.moved
        assert again.explain().claims  # whose tests run the frozen model from the hook layer on
        assert again.explain(4).claims
    finally:
        handle.remove()
    assert len(runs) == 1


def test_a_feature_table_has_labels_activations_and_measured_effects(
    lm: FrozenLM, decoder: SaeDecoderForCausalLM, reading: Reading
) -> None:
    table = reading.features(-2)
    at = len(reading.ids) - 2
    acts, indices = (column[at] for column in reading.states.latents)
    logprobs = decoder.logits(SparseLatents(acts, indices)).log_softmax(-1)
    assert (table.at, table.token.token_id) == (at, int(logprobs.argmax()))
    assert {row.latent for row in table} == set(indices[acts > 0].tolist())
    for row in table:
        without = SparseLatents(acts * (indices != row.latent), indices)
        after = decoder.logits(without).log_softmax(-1)
        effect = float((logprobs - after)[table.token.token_id])
        assert row.effect == pytest.approx(effect, abs=1e-4)
        assert row.activation == float(acts[indices == row.latent].sum())
        text = f"a label {row.latent}"
        sure = row.latent % 2 == 0
        assert (row.label, row.unsure_label) == ((text, None) if sure else (None, text))
    assert f"#{table[0].latent}" in repr(table)


def test_a_change_everywhere_is_a_rerun_of_both_models(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, reading: Reading
) -> None:
    ids = torch.tensor([reading.ids])
    resid, _ = lm.resid_and_final(ids, 2)
    acts = sae.encode_dense(resid[0])
    busiest = (acts[1:] > 0).sum(0).topk(2).indices.tolist()
    quiet = int((acts[1:] > 0).sum(0).argmin())
    everything = torch.arange(160).expand(len(acts), -1)
    for changes in (
        Changes({busiest[0]: 0.0}),
        Changes({busiest[0]: 3.0, busiest[1]: 0.5}),
        Changes({busiest[0]: 2.0}, {busiest[1]: 4.0, quiet: 6.0}),
    ):
        new = acts.clone()
        for latent, factor in changes.scale.items():
            new[1:, latent] *= factor
        for latent, act in changes.set.items():
            new[1:, latent] = act
        found = reading.intervene(changes)
        named = [*changes.scale, *changes.set]
        assert found.act == pytest.approx(float(acts[1:, named].sum()), rel=1e-4)
        assert found.new_act == pytest.approx(float(new[1:, named].sum()), rel=1e-4)
        assert (found.first, found.at) == (1, len(acts) - 1)
        frozen = [
            lm.unembed(lm.tail(r[None], 2)[0]).log_softmax(-1)
            for r in (resid[0], resid[0] + (new - acts) @ sae.W_dec)
        ]
        mine = [decoder.logits(SparseLatents(a, everything)).log_softmax(-1) for a in (acts, new)]
        for change, (before, after) in ((found.frozen, frozen), (found.decoder, mine)):
            assert change.moved == pytest.approx(kl(before, after)[1:], abs=5e-5)
            first = int(before[-1].argmax())
            assert change.shifts[0].token_id == first
            assert change.effect == pytest.approx(float((before - after)[-1, first]), abs=2e-4)
    assert max(found.frozen.moved) > 1e-3


def test_a_quiet_latent_can_be_set_at_one_place(lm: FrozenLM, sae: Sae, reading: Reading) -> None:
    resid, _ = lm.resid_and_final(torch.tensor([reading.ids]), 2)
    acts = sae.encode_dense(resid[0])
    quiet = int(acts[4].argmin())
    assert acts[4, quiet] == 0
    with pytest.raises(BadInputError, match=f"#{quiet} is not active at token 4"):
        reading.amplify(quiet, 2.0, 4)
    found = reading.activate(quiet, 5.0, 4)
    assert (found.act, found.new_act, found.at) == (0.0, 5.0, 4)
    before = lm.unembed(lm.tail(resid, 2)[0, 4:]).log_softmax(-1)
    resid[0, 4] += 5.0 * sae.W_dec[quiet]
    after = lm.unembed(lm.tail(resid, 2)[0, 4:]).log_softmax(-1)
    assert found.frozen.moved == pytest.approx(kl(before, after), abs=5e-5)


def test_what_is_nowhere_active_is_not_taken_out(reading: Reading, sae: Sae) -> None:
    active = set(reading.states.latents.indices[1:][reading.states.latents.acts[1:] > 0].tolist())
    quiet = next(latent for latent in range(160) if latent not in active)
    with pytest.raises(BadInputError, match="not active in this prompt"):
        reading.ablate(quiet)
    with pytest.raises(BadInputError, match="no latent 160"):
        reading.ablate(160)
    for at in (0, len(reading.ids), -len(reading.ids)):
        with pytest.raises(BadInputError, match="attention sink"):
            reading.features(at)


def test_an_early_explanation_is_of_the_text_so_far(reading: Reading) -> None:
    early = reading.explain(3)
    prefix = Reading(reading.reader, reading.ids[:4])
    assert early.prompt == prefix.prompt
    assert early.tokens == prefix.tokens
    assert early.kl == pytest.approx(prefix.explain().kl, abs=1e-4)
    assert early.kl == pytest.approx(reading.kl[3], abs=1e-4)
    bare = replace(reading.reader, labels={}).read(PROMPT)
    assert bare.features(-1)[0].label is None

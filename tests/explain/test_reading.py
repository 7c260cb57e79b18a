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
        Changes({busiest[0]: 2.0}, {busiest[1]: 4.0}, {quiet: (6.0, 7.0)}),
    ):
        new = acts.clone()
        for latent, factor in changes.scale.items():
            new[1:, latent] *= factor
        for latent, act in changes.set.items():
            new[1:, latent] = act
        for latent, (low, high) in changes.clamp.items():
            new[1:, latent] = new[1:, latent].clip(low, high)
        found = reading.intervene(changes)
        named = changes.latents
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


def test_effects_are_about_the_target_that_was_asked_for(
    lm: FrozenLM, decoder: SaeDecoderForCausalLM, reading: Reading
) -> None:
    """Features on the decoder, interventions on both models, against dense reruns."""
    at = len(reading.ids) - 1
    target = reading.target(7, 11)
    assert target == (7, 11)
    acts, indices = (column[at] for column in reading.states.latents)

    def margin(acts: Tensor) -> float:
        logits = decoder.logits(SparseLatents(acts, indices))
        return float(logits[7] - logits[11])

    table = reading.features(at, target)
    assert (table.token.token_id, table.minus and table.minus.token_id) == (7, 11)
    assert " less " in repr(table)
    for row in table:
        effect = margin(acts) - margin(acts * (indices != row.latent))
        assert row.effect == pytest.approx(effect, abs=1e-4)
    assert max(abs(row.effect) for row in table) > 1e-3

    latent = table[0].latent
    found = reading.intervene(Changes({latent: 3.0}), at, target=target)
    doubled = acts * torch.where(indices == latent, 3.0, 1.0)
    assert found.decoder.target == pytest.approx((margin(acts), margin(doubled)), abs=1e-4)
    resid, _ = lm.resid_and_final(torch.tensor([reading.ids]), 2)
    edited = resid.clone()
    edited[0, at] += 2.0 * acts[indices == latent].sum() * reading.reader.sae.W_dec[latent]
    values = [lm.unembed(lm.tail(r, 2)[0, at]) for r in (resid, edited)]
    frozen = tuple(float(logits[7] - logits[11]) for logits in values)
    assert found.frozen.target == pytest.approx(frozen, abs=1e-4)
    for change in (found.frozen, found.decoder):
        assert change.effect == pytest.approx(change.target[0] - change.target[1], abs=1e-5)
        assert {7, 11} <= {shift.token_id for shift in change.shifts}


def test_a_change_from_a_place_on_leaves_what_comes_before(
    lm: FrozenLM, sae: Sae, reading: Reading
) -> None:
    resid, _ = lm.resid_and_final(torch.tensor([reading.ids]), 2)
    found = reading.intervene(Changes(set={5: 9.0}), start=4)
    assert (found.first, found.at) == (4, len(reading.ids) - 1)
    edited = resid.clone()
    edited[0, 4:] += (9.0 - sae.encode_dense(resid[0, 4:])[:, 5, None]) * sae.W_dec[5]
    before, after = (lm.unembed(lm.tail(r, 2)[0, 4:]).log_softmax(-1) for r in (resid, edited))
    assert found.frozen.moved == pytest.approx(kl(before, after), abs=5e-5)
    with pytest.raises(BadInputError, match="attention sink"):
        reading.intervene(Changes(set={5: 9.0}), start=0)


def test_a_target_is_one_token(reading: Reading) -> None:
    text = next(text for text in reading.tokens if text.strip().isalpha())
    assert reading.target(text).token_id in reading.ids
    with pytest.raises(BadInputError, match="is not one token"):
        reading.target("two words of text")
    with pytest.raises(BadInputError, match="is not one token"):
        reading.target("")
    with pytest.raises(BadInputError, match="no token 99999"):
        reading.target(99999)
    with pytest.raises(BadInputError, match="less itself"):
        reading.target(7, 7)


def test_sinks_are_marked(reading: Reading) -> None:
    marks = [trace.sink for trace in reading.predictions]
    assert marks[0]
    assert not all(marks)
    reading.states.resid[3] *= 1000
    again = Reading(reading.reader, reading.ids)
    again.states = reading.states
    assert again.predictions[3].sink


def test_two_prompts_are_compared(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, reading: Reading
) -> None:
    other = reading.reader.read("The import statement finds another")
    found = reading.compare(other, -1, 2)
    at = (len(reading.ids) - 1, 2)
    assert found.at == at
    resids = [lm.resid_and_final(torch.tensor([r.ids]), 2)[0][0] for r in (reading, other)]
    acts = [sae.encode_dense(resid)[place] for resid, place in zip(resids, at, strict=True)]
    named = {one.latent: one for one in found.features}
    assert set(named) == set(((acts[0] > 0) | (acts[1] > 0)).nonzero()[:, 0].tolist())
    scales = reading.reader.explainer.scales
    for latent, one in named.items():
        pair = [float(side[latent]) for side in acts]
        assert [one.activation, one.other_activation] == pytest.approx(pair, rel=1e-4)
        usual = float(scales[latent]) or max(pair)
        assert one.difference == pytest.approx((pair[1] - pair[0]) / usual, rel=1e-3, abs=1e-6)
    sizes = [abs(one.difference) for one in found.features]
    assert sizes == sorted(sizes, reverse=True)

    finals = [
        lm.unembed(lm.tail(resid[None], 2)[0, place])
        for resid, place in zip(resids, at, strict=True)
    ]
    mine = [decoder.logits(SparseLatents(a, torch.arange(160))) for a in acts]
    for shown, logits in ((found.frozen, finals), (found.decoder, mine)):
        first, second = (row.log_softmax(-1) for row in logits)
        assert shown.kl == pytest.approx(kl(first, second), abs=1e-4)
        ids = [shift.token_id for shift in shown.shifts]
        assert set(ids) == {*first.topk(5).indices.tolist(), *second.topk(5).indices.tolist()}
        assert [s.before for s in shown.shifts] == pytest.approx(
            first.exp()[ids].tolist(), abs=1e-5
        )
        assert [s.after for s in shown.shifts] == pytest.approx(
            second.exp()[ids].tolist(), abs=1e-5
        )
    same = reading.compare(reading)
    assert {one.difference for one in same.features} == {0.0}
    assert (same.frozen.kl, same.decoder.kl) == (0.0, 0.0)

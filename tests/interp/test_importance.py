from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rldecoder.errors import NumericalError
from rldecoder.interp.importance import (
    PatchBatch,
    Subject,
    TargetName,
    attribute,
    considered_positions,
    exact_effect,
    make_batch,
    sequence_metrics,
)
from rldecoder.sae.model import SparseLatents


def _fixed_logit(subject: Subject, token: int):  # type: ignore[no-untyped-def]
    def metric(batch: PatchBatch, acts: Tensor, error: Tensor) -> Tensor:
        latents = SparseLatents(acts, batch.latents.indices)
        return subject.decoder.logits(latents)[batch.metric_mask][:, token]

    return metric


def test_attribution_is_exact_for_a_logit_of_the_linear_decoder(
    subject: Subject, batch: PatchBatch
) -> None:
    metric = _fixed_logit(subject, token=17)
    found = attribute(metric, batch)
    tokens = torch.full(batch.metric_tokens.shape, 17)
    contributions = subject.decoder.contributions(batch.latents, tokens)
    expected = torch.where(batch.metric_mask[..., None], -contributions, 0.0)
    torch.testing.assert_close(found.latents, expected, atol=1e-5, rtol=1e-4)
    baseline = sequence_metrics(metric, batch, batch.latents.acts)
    for latent in batch.latents.indices[0, 3].tolist():
        estimate = float(found.latents[batch.latents.indices == latent].sum())
        assert exact_effect(metric, batch, latent, baseline) == pytest.approx(estimate, abs=2e-4)
    assert float(found.error.abs().sum()) == 0


def one_of(kind: str, request: pytest.FixtureRequest) -> Subject:
    chosen: Subject = request.getfixturevalue(kind)
    return chosen


ASKED = (
    ("subject", "decoder"), ("subject", "frozen"), ("subject_with_blocks", "decoder"),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "target"), ASKED)
def test_attribution_equals_a_finite_difference(
    kind: str, target: TargetName, batch: PatchBatch, request: pytest.FixtureRequest
) -> None:
    metric = one_of(kind, request).metric(target)
    found = attribute(metric, batch)
    acts = batch.latents.acts
    for place in ((0, 3, 0), (1, 5, 2), (2, 1, 4), (0, 11, 1)):
        step = 0.02 * float(acts[place])
        moved = []
        for sign in (1, -1):
            changed = acts.clone()
            changed[place] += sign * step
            moved.append(float(metric(batch, changed, batch.error).double().sum()))
        slope = (moved[0] - moved[1]) / (2 * step)
        expected = -float(acts[place]) * slope
        assert float(found.latents[place]) == pytest.approx(expected, rel=0.05, abs=2e-3)


def test_error_importance_equals_a_finite_difference(subject: Subject, batch: PatchBatch) -> None:
    metric = subject.metric("frozen")
    found = attribute(metric, batch)
    up, down = batch.error.clone(), batch.error.clone()
    up[1, 4] *= 1.01
    down[1, 4] *= 0.99
    acts = batch.latents.acts
    slope = (
        metric(batch, acts, up).double().sum() - metric(batch, acts, down).double().sum()
    ) / 0.02
    assert float(found.error[1, 4]) == pytest.approx(-float(slope), rel=0.05, abs=2e-3)


def test_splice_without_ablation_is_the_frozen_model(subject: Subject) -> None:
    ids = torch.arange(20).reshape(2, 10) * 7
    mask = torch.ones(ids.shape, dtype=torch.bool)
    batch = make_batch(subject, ids, mask, metric_token="next_token")
    values = subject.metric("frozen")(batch, batch.latents.acts, batch.error)
    logits = subject.lm.model(ids).logits.float().log_softmax(-1)
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None]).reshape(-1)
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)
    assert not bool(batch.metric_mask[:, -1].any())


def test_metric_token_is_the_frozen_argmax(subject: Subject, batch: PatchBatch) -> None:
    values = subject.metric("frozen")(batch, batch.latents.acts, batch.error)
    # No token is more likely than the argmax: its log-probability is above the uniform one.
    assert float(values.min()) > -float(torch.tensor(subject.lm.vocab_size).log())


def test_first_position_is_not_read_by_the_sae(subject: Subject, batch: PatchBatch) -> None:
    assert float(batch.latents.acts[:, 0].abs().sum()) == 0
    assert float(batch.latents.acts[:, 1:].min(-1).values.min()) > 0


@pytest.mark.parametrize(("kind", "target"), ASKED)
def test_integrated_gradients_are_complete(
    kind: str, target: TargetName, batch: PatchBatch, request: pytest.FixtureRequest
) -> None:
    metric = one_of(kind, request).metric(target)
    found = attribute(metric, batch, integrated_steps=64)
    acts = batch.latents.acts
    none = float(metric(batch, torch.zeros_like(acts), batch.error).double().sum())
    total = float(found.metric.double().sum())
    assert float(found.latents.double().sum()) == pytest.approx(none - total, rel=0.02, abs=0.02)
    one_step = attribute(metric, batch)
    assert not torch.allclose(one_step.latents, found.latents, rtol=1e-3)


def test_exact_effect_equals_a_dense_recomputation(subject: Subject, batch: PatchBatch) -> None:
    acts, indices = batch.latents
    dense = torch.zeros(3, 14, subject.sae.num_latents).scatter(-1, indices, acts)
    latent = int(indices[0, 5, 0])

    def run(values: Tensor) -> float:
        resid = values @ subject.sae.W_dec + subject.sae.b_dec + batch.error
        logits = subject.lm.unembed(subject.lm.tail(resid, 2)).log_softmax(-1)
        picked = logits.gather(-1, batch.metric_tokens[..., None]).squeeze(-1)
        return float(picked[batch.metric_mask].double().sum())

    ablated = dense.clone()
    ablated[..., latent] = 0
    expected = run(ablated) - run(dense)
    metric = subject.metric("frozen")
    baseline = sequence_metrics(metric, batch, acts)
    assert float(baseline.sum()) == pytest.approx(run(dense), abs=2e-4)
    assert exact_effect(metric, batch, latent, baseline) == pytest.approx(expected, abs=2e-4)


def test_exact_effect_through_blocks_equals_a_dense_recomputation(
    subject_with_blocks: Subject, batch: PatchBatch
) -> None:
    decoder, unembed = subject_with_blocks.decoder, subject_with_blocks.lm.unembed
    acts, indices = batch.latents
    dense = torch.zeros(3, 14, decoder.W.shape[0]).scatter(-1, indices, acts)
    latent = int(indices[0, 5, 0])

    def run(values: Tensor) -> float:
        logits = unembed(decoder.blocks(values @ decoder.W + decoder.b)).log_softmax(-1)
        picked = logits.gather(-1, batch.metric_tokens[..., None]).squeeze(-1)
        return float(picked[batch.metric_mask].double().sum())

    ablated = dense.clone()
    ablated[..., latent] = 0
    metric = subject_with_blocks.metric("decoder")
    baseline = sequence_metrics(metric, batch, acts)
    expected = run(ablated) - run(dense)
    assert abs(expected) > 1e-3
    assert exact_effect(metric, batch, latent, baseline) == pytest.approx(expected, abs=2e-4)


def test_blocks_look_back_and_a_linear_decoder_does_not(
    subject: Subject, subject_with_blocks: Subject, batch: PatchBatch
) -> None:
    last = torch.zeros_like(batch.metric_mask)
    last[:, -1] = True
    one = batch._replace(metric_mask=last)
    for asked, looks_back in ((subject, False), (subject_with_blocks, True)):
        assert asked.looks_back("decoder") is looks_back
        found = attribute(asked.metric("decoder"), one).latents
        considered = considered_positions(one, looks_back=looks_back)
        assert bool(found[:, 1:-1].abs().sum() > 0) is looks_back
        assert float(found[~considered].abs().sum()) == 0


def test_a_latent_that_never_fires_has_no_effect(subject: Subject, batch: PatchBatch) -> None:
    silent = next(i for i in range(96) if not bool((batch.latents.indices == i).any()))
    assert exact_effect(subject.metric("frozen"), batch, silent, torch.zeros(3)) == 0.0


def test_considered_positions_follow_what_each_model_reads(batch: PatchBatch) -> None:
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, 3] = True
    one = batch._replace(metric_mask=mask)
    assert considered_positions(one, looks_back=False)[0].tolist() == [0, 0, 0, 1, 0, 0]
    assert considered_positions(one, looks_back=True)[0].tolist() == [0, 1, 1, 1, 0, 0]


def test_latents_after_the_last_metric_position_do_not_count(
    subject: Subject, batch: PatchBatch
) -> None:
    found = attribute(subject.metric("frozen"), batch)
    assert subject.looks_back("frozen")
    assert not subject.looks_back("decoder")
    outside = ~considered_positions(batch, looks_back=True)
    assert float(found.latents[outside].abs().sum()) == 0
    assert float(found.error[:, -1].abs().sum()) == 0


def test_a_metric_that_is_not_finite_is_an_error(subject: Subject, batch: PatchBatch) -> None:
    broken = batch._replace(error=torch.full_like(batch.error, torch.nan))
    with pytest.raises(NumericalError, match="NaN or infinite"):
        attribute(subject.metric("frozen"), broken)

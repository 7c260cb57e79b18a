"""Chunked distillation losses against plain dense autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder import distill
from rldecoder.decoder.distill import (
    NO_LABEL,
    LogitBuffers,
    NextTokens,
    chunk_rows,
    chunked_kl_ce,
    matmul_precision,
)
from rldecoder.lm.frozen import FrozenLM


def dense_losses(
    hidden: Tensor, frozen: Tensor, lm: FrozenLM, labels: Tensor, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same losses and choices with all logits in one graph."""
    logprobs = F.log_softmax(lm.unembed(hidden), -1)
    frozen_logprobs = F.log_softmax(lm.unembed(frozen), -1)
    kl = F.kl_div(logprobs, frozen_logprobs, log_target=True, reduction="none").sum(-1)
    ce = F.nll_loss(logprobs, labels, ignore_index=NO_LABEL, reduction="none")
    return (1 - ce_weight) * kl + ce_weight * ce, kl, ce, logprobs.argmax(-1)


def random_case(num_tokens: int, seed: int, lm: FrozenLM) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, lm.d_model, generator=generator)
    frozen = torch.randn(num_tokens, lm.d_model, generator=generator)
    labels = torch.randint(lm.vocab_size, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.3] = NO_LABEL
    return hidden, frozen, labels


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_tokens=st.integers(1, 17),
    rows=st.integers(1, 20),
    ce_weight=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_dense_autograd(
    num_tokens: int, rows: int, ce_weight: float, seed: int, lm: FrozenLM
) -> None:
    hidden, frozen, labels = random_case(num_tokens, seed, lm)
    weights = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed + 1))
    results = []
    for chunked in (True, False):
        leaf = hidden.clone().requires_grad_()
        losses = (
            chunked_kl_ce(
                leaf,
                frozen,
                lm,
                labels=labels,
                ce_weight=ce_weight,
                buffers=LogitBuffers(rows),
                choices=True,
            )
            if chunked
            else dense_losses(leaf, frozen, lm, labels, ce_weight)
        )
        (losses[0] * weights).sum().backward()
        results.append((*(loss.detach() for loss in losses), leaf.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_follows_a_capped_unembedding(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.model.config, "final_logit_softcapping", 0.5, raising=False)
    hidden, frozen, labels = random_case(6, 0, lm)
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    chunked_kl_ce(
        leaves[0], frozen, lm, labels=labels, ce_weight=0.3, buffers=LogitBuffers(4)
    ).loss.sum().backward()
    dense_losses(leaves[1], frozen, lm, labels, 0.3)[0].sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-6, rtol=1e-5)


def test_is_zero_with_zero_gradient_at_the_frozen_hidden(lm: FrozenLM) -> None:
    _, frozen, _ = random_case(5, 1, lm)
    leaf = frozen.clone().requires_grad_()
    losses = chunked_kl_ce(leaf, frozen, lm)
    losses.loss.sum().backward()
    assert torch.equal(losses.kl, torch.zeros(5))
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) < 1e-7


def test_unlabelled_rows_carry_kl_only(lm: FrozenLM) -> None:
    hidden, frozen, _ = random_case(4, 2, lm)
    losses = chunked_kl_ce(hidden, frozen, lm, ce_weight=0.5)
    assert torch.equal(losses.ce, torch.zeros(4))
    torch.testing.assert_close(losses.loss, 0.5 * losses.kl)


def test_never_holds_more_logits_than_a_chunk(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    unembed = lm.unembed
    monkeypatch.setattr(
        lm, "unembed", lambda hidden, out: (seen.append(len(hidden)), unembed(hidden, out=out))[1]
    )
    hidden, frozen, _ = random_case(50, 3, lm)
    loss = chunked_kl_ce(hidden.requires_grad_(), frozen, lm, buffers=LogitBuffers(8)).loss
    assert max(seen) == 8
    assert sum(seen) == 2 * 50
    saved = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [tuple(tensor.shape) for tensor in saved] == [(50, lm.d_model)]


def test_frozen_weights_get_no_gradient(lm: FrozenLM) -> None:
    hidden, frozen, labels = random_case(4, 4, lm)
    frozen.requires_grad_()
    chunked_kl_ce(hidden.requires_grad_(), frozen, lm, labels=labels).loss.sum().backward()
    assert frozen.grad is None
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_chunk_rows_fit_the_bound() -> None:
    assert chunk_rows(49_152) * 49_152 * 4 <= distill.CHUNK_BYTES
    assert chunk_rows(10**9) >= 1


def test_precision_is_restored_also_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()

    def fail_inside() -> None:
        with matmul_precision("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.get_float32_matmul_precision() == before


def test_medium_precision_stays_near_float32(lm: FrozenLM) -> None:
    hidden, frozen, labels = random_case(64, 5, lm)
    exact = chunked_kl_ce(hidden, frozen, lm, labels=labels).kl
    with matmul_precision("medium"):
        rough = chunked_kl_ce(hidden, frozen, lm, labels=labels).kl
    torch.testing.assert_close(rough, exact, atol=5e-3, rtol=0.05)


def test_next_tokens_equal_a_naive_search(reader: ActivationReader) -> None:
    rows = [
        (int(seq), int(pos), int(token))
        for batch in reader.ordered(7, columns=())
        for seq, pos, token in zip(batch.seq_id, batch.pos, batch.token_id, strict=True)
    ]
    at = {(seq, pos): token for seq, pos, token in rows}
    expected = [at.get((seq, pos + 1), NO_LABEL) for seq, pos, _ in rows]
    next_tokens = NextTokens(reader)
    seq_id = torch.tensor([row[0] for row in rows])
    pos = torch.tensor([row[1] for row in rows])
    assert next_tokens.labels(seq_id, pos).tolist() == expected
    assert expected.count(NO_LABEL) == 6

    # A table of some rows knows what comes after the last of them.
    for first, end in ((0, 10), (9, 33), (14, 28), (70, len(rows))):
        some = NextTokens(reader, first, end)
        assert some.labels(seq_id[first:end], pos[first:end]).tolist() == expected[first:end]

"""Rows put into sequences and back: the decoder sees what it would see in the text."""

from __future__ import annotations

import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import concatenate
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.decoder.sequences import hidden_of_rows, in_parts, whole_sequences
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae


@pytest.fixture
def deep(lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
    torch.manual_seed(0)
    decoder = new_decoder(lm, sae, [2, 3])
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return decoder


@torch.no_grad()
def test_rows_give_what_their_sequences_give(
    deep: SaeDecoderForCausalLM, reader: ActivationReader
) -> None:
    batch = concatenate(list(whole_sequences(reader, 1000, columns=("resid",))))
    assert batch.resid is not None
    latents = deep.frozen.sae.encode(batch.resid.float())
    found = hidden_of_rows(deep, latents, batch.seq_id, batch.pos)
    for sequence in batch.seq_id.unique().tolist():
        mine = batch.seq_id == sequence
        alone = deep.hidden(
            type(latents)(
                torch.cat([torch.zeros(1, 8), latents.acts[mine]])[None],
                torch.cat([torch.zeros(1, 8, dtype=torch.long), latents.indices[mine]])[None],
            )
        )[0, 1:]
        torch.testing.assert_close(found[mine], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_missing_row_is_not_seen(deep: SaeDecoderForCausalLM, reader: ActivationReader) -> None:
    batch = concatenate(list(whole_sequences(reader, 1000, columns=("resid",))))
    first = batch.select(batch.seq_id == batch.seq_id[0])
    assert first.resid is not None
    latents = deep.frozen.sae.encode(first.resid.float())
    kept = torch.arange(len(first.pos)) != 4
    fewer = type(latents)(latents.acts[kept], latents.indices[kept])
    found = hidden_of_rows(deep, fewer, first.seq_id[kept], first.pos[kept])
    everything = hidden_of_rows(deep, latents, first.seq_id, first.pos)
    torch.testing.assert_close(found[:4], everything[:4], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[4:], everything[5:], atol=1e-3)


@pytest.mark.parametrize("batch_tokens", [7, 16, 40, 1000])
@pytest.mark.parametrize("max_tokens", [None, 20, 31])
def test_batches_begin_with_a_sequence(
    reader: ActivationReader, batch_tokens: int, max_tokens: int | None
) -> None:
    batches = list(whole_sequences(reader, batch_tokens, columns=("resid",), max_tokens=max_tokens))
    (expected,) = reader.ordered(1000, max_tokens=max_tokens)
    joined = concatenate(batches)
    assert torch.equal(joined.seq_id, expected.seq_id)
    assert torch.equal(joined.resid, expected.resid)
    assert all(int(batch.pos[0]) == 1 for batch in batches)
    assert max(len(batch.pos) for batch in batches) <= batch_tokens + 15


def test_linear_rows_need_no_order(
    decoder: SaeDecoderForCausalLM, reader: ActivationReader
) -> None:
    (batch,) = reader.ordered(1000)
    assert batch.resid is not None
    latents = decoder.frozen.sae.encode(batch.resid.float())
    found = hidden_of_rows(decoder, latents, batch.seq_id, batch.pos)
    assert torch.equal(found, decoder.hidden(latents))


@pytest.mark.parametrize("max_tokens", [1, 15, 16, 31, 1000])
def test_parts_are_cut_between_sequences(reader: ActivationReader, max_tokens: int) -> None:
    (batch,) = reader.ordered(1000)
    parts = list(in_parts(batch, max_tokens))
    assert torch.equal(concatenate(parts).resid, batch.resid)
    owners = [set(part.seq_id.tolist()) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert all(
        len(part.pos) <= max_tokens or len(own) == 1
        for part, own in zip(parts, owners, strict=True)
    )

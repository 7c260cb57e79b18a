"""Variants of positions against plain reruns of whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.decoder.places import (
    Past,
    Places,
    at_once,
    join_pasts,
    past_of_prompts,
    past_of_rows,
    resid_of,
)
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.selection import SparseLatents
from rldecoder.seeds import torch_generator

HOOK_LAYER, K, LENGTH = 2, 6, 11


@torch.no_grad()
def hidden_in(decoder: SaeDecoderForCausalLM, places: Places, size: int = 256) -> Tensor:
    """Predicted final hidden states [N, D], nothing changed."""
    resid = resid_of(decoder, places.latents)
    out = torch.empty_like(resid)
    for rows, predict in at_once(decoder, places, size):
        out[rows] = predict(resid[rows, None])[:, 0]
    return out


@pytest.fixture(scope="module", params=["tiny_lm_dir", "tiny_llama_dir"])
def decoder(request: pytest.FixtureRequest) -> SaeDecoderForCausalLM:
    folder: Path = request.getfixturevalue(request.param)
    lm = FrozenLM.load(folder)
    spec = SaeSpec(d_model=lm.d_model, num_latents=80, k=K, hook_layer=HOOK_LAYER)
    made = new_decoder(lm, Sae.random_init(spec, seed=1), [2, 3])
    made.blocks.copy_from(lm.base)
    with torch.no_grad():
        made.W.copy_(made.frozen.sae.W_dec)
        made.b.normal_(generator=torch_generator(1))
        made.blocks.sinks.normal_(generator=torch_generator(2))
    return made.requires_grad_(False)


def prompts(decoder: SaeDecoderForCausalLM, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Random tokens padded on the left, and their mask."""
    longest = max(lengths)
    ids = torch.randint(5, decoder.config.vocab_size, (len(lengths), longest))
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids, mask


@pytest.fixture
def text(decoder: SaeDecoderForCausalLM) -> SparseLatents:
    """[4, LENGTH, K]: four sequences; position 0 holds nothing, as in a cache."""
    torch.manual_seed(0)
    latents = decoder.features(torch.randint(5, 500, (4, LENGTH))).latents
    acts = latents.acts.clone()
    acts[:, 0] = 0
    return SparseLatents(acts, latents.indices)


def places_in(
    text: SparseLatents, seq: Tensor, pos: Tensor, hidden: Tensor | None = None
) -> Places:
    """Places in cached text; `hidden` [S, T] bool names rows that the cache left out (sinks)."""
    kept = torch.ones(4, LENGTH, dtype=torch.bool) if hidden is None else ~hidden
    kept[:, 0] = False
    row, column = kept.nonzero().unbind(-1)
    inside = torch.isin(row, seq)
    row, column = row[inside], column[inside]
    acts, indices = text
    rows = SparseLatents(acts[row, column], indices[row, column])
    past = past_of_rows(rows, row, column, seq, pos)
    return Places(SparseLatents(acts[seq, pos], indices[seq, pos]), past)


SEQ, POS = torch.tensor([3, 1, 3, 0, 1]), torch.tensor([7, 1, 2, 10, 9])


def test_unchanged_places_equal_whole_sequences(
    decoder: SaeDecoderForCausalLM, text: SparseLatents
) -> None:
    expected = decoder.hidden(text)[SEQ, POS]
    found = hidden_in(decoder, places_in(text, SEQ, POS), size=2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_variant_changes_its_place_alone(
    decoder: SaeDecoderForCausalLM, text: SparseLatents
) -> None:
    places = places_in(text, SEQ, POS)
    scale = torch.tensor([1.0, 0.0, -2.0])
    seen = []
    for rows, predict in at_once(decoder, places, 2):
        seen += rows.tolist()
        acts, indices = places.of(rows).latents
        variants = SparseLatents(acts[:, None] * scale[:, None], indices[:, None].expand(-1, 3, -1))
        found = predict(resid_of(decoder, variants))
        for i, row in enumerate(rows.tolist()):
            for j in range(3):
                changed = text.acts.clone()
                changed[SEQ[row], POS[row]] *= scale[j]
                alone = decoder.hidden(SparseLatents(changed, text.indices))[SEQ[row], POS[row]]
                torch.testing.assert_close(found[i, j], alone, atol=1e-4, rtol=1e-4)
    assert sorted(seen) == list(range(5))


def test_rows_that_a_cache_leaves_out_are_not_looked_at(
    decoder: SaeDecoderForCausalLM, text: SparseLatents
) -> None:
    left_out = torch.zeros(4, LENGTH, dtype=torch.bool)
    left_out[3, 4] = left_out[1, 5] = True
    mask = (~left_out).long()
    acts = text.acts.masked_fill(left_out[..., None], 0)
    expected = decoder.hidden(SparseLatents(acts, text.indices), mask)[SEQ, POS]
    found = hidden_in(decoder, places_in(text, SEQ, POS, left_out))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, hidden_in(decoder, places_in(text, SEQ, POS)), atol=1e-3)


def test_prompts_with_padding_on_the_left(decoder: SaeDecoderForCausalLM) -> None:
    torch.manual_seed(1)
    ids, mask = prompts(decoder, [5, 9, 2])
    latents = decoder.features(ids, mask).latents
    past = past_of_prompts(latents, mask)
    assert past.position.tolist() == [4, 8, 1]
    last = SparseLatents(latents.acts[:, -1], latents.indices[:, -1])
    found = hidden_in(decoder, Places(last, past))
    expected = decoder(latents=latents, attention_mask=mask, logits_to_keep=1).logits[:, 0]
    logits = decoder.frozen.lm.unembed(found)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


def test_joined_places_are_what_they_were(
    decoder: SaeDecoderForCausalLM, text: SparseLatents
) -> None:
    first, second = places_in(text, SEQ[:2], POS[:2]), places_in(text, SEQ[2:], POS[2:])
    assert first.past is not None
    assert second.past is not None
    shorter = Past(
        SparseLatents(*(column[:, :8] for column in first.past.latents)),
        first.past.visible[:, :8],
        first.past.sequence,
        first.past.position,
    )
    both = Places(
        SparseLatents(
            *(torch.cat(pair) for pair in zip(first.latents, second.latents, strict=True))
        ),
        join_pasts([shorter, second.past]),
    )
    expected = hidden_in(decoder, places_in(text, SEQ, POS))
    torch.testing.assert_close(hidden_in(decoder, both), expected, atol=1e-4, rtol=1e-4)
    some = both.of(torch.tensor([4, 0]))
    torch.testing.assert_close(hidden_in(decoder, some), expected[[4, 0]], atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_place_alone(
    decoder: SaeDecoderForCausalLM, text: SparseLatents
) -> None:
    places = places_in(text, SEQ, POS)
    resid = resid_of(decoder, places.latents)
    for rows, predict in at_once(decoder, places, 8):
        leaf = resid[rows, None].clone().requires_grad_()
        (found,) = torch.autograd.grad(predict(leaf)[..., 3].sum(), leaf)
        for i, row in enumerate(rows.tolist()):
            whole = resid_of(decoder, text).clone().requires_grad_()
            hidden = decoder.blocks(whole)[SEQ[row], POS[row], 3]
            (expected,) = torch.autograd.grad(hidden, whole)
            torch.testing.assert_close(
                found[i, 0], expected[SEQ[row], POS[row]], atol=1e-5, rtol=1e-3
            )


def test_a_linear_decoder_needs_no_past(
    decoder: SaeDecoderForCausalLM, text: SparseLatents
) -> None:
    linear = new_decoder(decoder.frozen.lm, decoder.frozen.sae)
    places = Places(SparseLatents(text.acts[1], text.indices[1]))
    torch.testing.assert_close(hidden_in(linear, places, 3), linear.hidden(places.latents))
    with pytest.raises(BadInputError, match="nothing is known of the text"):
        hidden_in(decoder, places)

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rldecoder.interp.examples import token_effects, top_examples
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.sae.model import SparseLatents

if TYPE_CHECKING:
    from rldecoder.interp.importance import Subject

COLUMNS: dict[str, list[Any]] = {
    "latent": [7, 7, 7, 3],
    "kind": ["top", "top", "negative", "top"],
    "rank": [0, 1, 0, 0],
    "seq_id": [4, 5, 6, 6],
    "pos": [3, 1, 0, 2],
    "act": [2.0, 1.0, 0.0, 0.5],
    "start": [2, 0, 0, 0],
    "tokens": [[11, 12, -1], [9, 8], [1], [2, 3, 4]],
}


def test_shown_examples_carry_texts_and_focus() -> None:
    vocabulary = Vocabulary([f" w{i}" for i in range(50)])
    shown = top_examples(pa.table(COLUMNS), vocabulary, 1)
    assert [len(shown[latent]) for latent in (7, 3)] == [1, 1]
    (first,) = shown[7]
    assert first.tokens == [" w11", " w12", ""]
    assert first.tokens[first.focus] == " w12"
    assert (first.seq_id, first.pos, first.act) == (4, 3, 2.0)
    assert 1 not in shown


def test_a_rows_own_way_past_blocks_is_all_that_silent_blocks_leave(
    subject_with_blocks: Subject,
) -> None:
    decoder = copy.deepcopy(subject_with_blocks.decoder)
    with torch.no_grad():
        for block in decoder.blocks.blocks:
            for name, weight in block.named_parameters():
                if "c_proj" in name:
                    weight.zero_()
        decoder.b.zero_()
        for bridge in decoder.blocks.maps():
            bridge.bias.zero_()
        latents = torch.tensor([[[0], [3], [5]]])
        hidden = decoder.hidden(SparseLatents(torch.full(latents.shape, 50.0), latents))[0, 1:]
        nothing = decoder.hidden(SparseLatents(torch.zeros(latents.shape), latents))[0, 1:]
        direct = decoder.direct(torch.tensor([3, 5]))
    torch.testing.assert_close(hidden - nothing, direct, atol=1e-4, rtol=1e-3)


def test_token_effects_equal_the_full_product(subject: Subject) -> None:
    vocabulary = Vocabulary.from_tokenizer(subject.lm.tokenizer, subject.lm.vocab_size)
    latents = np.arange(70)
    found = token_effects(subject.decoder, latents, vocabulary, 5)
    assert len(found) == 70
    logits = subject.decoder.W @ subject.lm.unembedding.T
    for latent in (0, 66):
        up, down = found[latent]
        named = torch.tensor([bool(text) for text in vocabulary.texts])
        order = logits[latent].masked_fill(~named, -torch.inf).argsort(descending=True)[:5]
        assert [effect.token_id for effect in up] == order.tolist()
        assert up[0].effect == pytest.approx(float(logits[latent, order[0]]), rel=1e-4)
        assert down[0].effect == pytest.approx(float(logits[latent][named].min()), rel=1e-4)
        assert up[0].token == vocabulary.texts[up[0].token_id]

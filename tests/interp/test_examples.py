from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rldecoder.interp.examples import token_effects, top_examples
from rldecoder.interp.vocabulary import Vocabulary

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

from __future__ import annotations

import numpy as np

from rldecoder.interp.ablation_pass import Places
from rldecoder.interp.output_sets import Gains, OutputSet, fit_sets

VOCABULARY = 32
EVERYWHERE, ONE_DOCUMENT = 30, 31


def sets_of(gains: list[dict[int, float]], num_documents: int = 4) -> list[OutputSet]:
    """Sets of latents that raise these tokens at two places of each document."""
    places_each = 2 * num_documents
    row = np.repeat(np.arange(len(gains)), places_each)
    document = np.tile(np.arange(places_each) // 2, len(gains))
    number = np.arange(row.size)
    act, draw = np.ones(row.size, np.float32), np.zeros(row.size)
    found = Gains.empty(row.size, VOCABULARY)
    for place in number:
        for slot, (token, gain) in enumerate(gains[row[place]].items()):
            found.raised[place, slot] = token
            found.raised_by[place, slot] = gain * (token != ONE_DOCUMENT or document[place] == 0)
    return fit_sets(Places(row, row, number, number, document, act, draw), found, len(gains))


def test_what_every_latent_raises_comes_after_what_only_this_one_does() -> None:
    # The common token gains four times as much at every place.
    found = sets_of(
        [{EVERYWHERE: 0.004, latent: 0.001, latent + 10: 0.0005} for latent in range(8)]
    )
    # Its weight is 0.004 * 0.004 / 0.004; those of the others 0.1 and 0.025.
    assert [held.tokens for held in found] == [(i, i + 10, EVERYWHERE) for i in range(8)]


def test_one_latent_alone_is_weighed_by_gains() -> None:
    (held,) = sets_of([{1: 0.001, 2: 0.002, 3: 0.0001}])
    assert held.tokens == (2, 1)


def test_a_token_of_one_document_is_no_part_of_the_set() -> None:
    found = sets_of([{ONE_DOCUMENT: 0.5, latent: 0.001} for latent in range(3)])
    assert [held.tokens for held in found] == [(0,), (1,), (2,)]


def test_too_few_documents_give_no_set() -> None:
    (held,) = sets_of([{1: 0.01}], num_documents=2)
    assert not held.tokens
    assert held.failure is not None

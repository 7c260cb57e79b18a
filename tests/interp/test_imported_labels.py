"""Labels of others: what the reader reads, what it leaves unscored, and their controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.imported_labels import (
    IMPORTED,
    ImportedLabels,
    Ours,
    TokenReader,
    read_label,
    score_imported,
)
from rldecoder.interp.neuronpedia_labels import Explanation, Explanations
from rldecoder.interp.predicate import NgramIn, Or, TokenIn
from rldecoder.interp.scores import LabelScores
from rldecoder.interp.vocabulary import Vocabulary

if TYPE_CHECKING:
    from conftest import Planted

NOTHING = LabelScores(
    firings=3, base_rate=0.1, detection=0.5, detection_positive=1, detection_negative=1,
    fuzzing_windows=0, f1=0.25, precision=0.5, fuzzing=None, recall=None, auprc=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind", "texts"),
    [
        ('the words "cat" and "dog"', "input", ("cat", "dog")),
        ("occurrences of the word 'don't'", "input", ("don't",)),
        ("“cat”, ‘dog’, `cow`, «duck»", "input", ("cat", "dog", "cow", "duck")),
        ('the token " the"', "input", (" the",)),
        ('"cat", "cat"', "input", ("cat",)),
        ('say "cat"', "output", ("cat",)),
        ('predicts the word "cat" or "dog"', "output", ("cat", "dog")),
        ("references to cats", None, ()),
        ('references to "cat"', None, ()),
        ('the next token is "cat"', None, ()),
        ('the letter "a" in the word "cat"', None, ()),
        ('words other than "cat"', None, ()),
        ('not "cat"', None, ()),
        ("the dog's and the cat's", None, ()),
        ("say cat", None, ()),
        ("", None, ()),
    ],
)
def test_only_mere_lists_of_tokens_are_read(
    text: str, kind: str | None, texts: tuple[str, ...]
) -> None:
    found = read_label(text)
    assert (found.kind, found.texts) == (kind, texts)
    assert (found.why_not is None) == (kind is not None)


def test_quoted_texts_become_tokens_or_what_spells_them() -> None:
    vocabulary = Vocabulary(["cat", " Cat", " CAT", "s", " do", "g", "\n", " ", "do"])
    spelled = {"dog": [8, 5], " dog": [4, 5], "Dog": [], " Dog": [8, 7, 5]}
    reader = TokenReader(vocabulary, lambda text: spelled.get(text, []))
    assert reader.predicate(["cat"]) == TokenIn(tokens=(0, 1, 2))
    assert reader.predicate(["\n"]) == TokenIn(tokens=(6,))
    assert reader.predicate([" "]) == TokenIn(tokens=(7,))
    found = reader.predicate(["cat", "dog"])
    assert isinstance(found, Or)
    assert found.parts[0] == TokenIn(tokens=(0, 1, 2))
    assert set(found.parts[1:]) == {
        NgramIn(ngrams=((4, 5), (8, 5))), NgramIn(ngrams=((8, 7, 5),)),
    }  # fmt: skip
    assert reader.predicate(["zebra"]) is None


def scored(
    planted: Planted, rows: list[Explanation], ours: dict[int, Ours] | None = None
) -> tuple[list[dict[str, object]], ImportedLabels]:
    """Score explanations of the planted latents; the control's latents fire anywhere."""
    rng = np.random.default_rng(0)
    noise = planted.scored.firings.select(np.arange(4))
    noise.matrix.indices[:] = np.concatenate(
        [np.sort(rng.choice(planted.scored.grid.cells, n, replace=False)) for n in noise.counts]
    )
    return score_imported(
        Explanations("0-res", "planted", rows, 2),
        planted.scored,
        SplitFirings(planted.scored.grid, noise),
        ours or {},
        TokenReader(planted.vocabulary, lambda text: []),
        planted.vocabulary,
        window_tokens=8,
        acceptance=Acceptance(detection=0.8, precision=0.3),
        rng=rng,
    )


def quoted(planted: Planted, latent: int) -> str:
    """What the latent really fires on, as somebody would write it."""
    predicate = planted.predicates[latent]
    assert isinstance(predicate, TokenIn)
    return "the words " + ", ".join(f'"{planted.vocabulary.texts[t]}"' for t in predicate.tokens)


def test_right_labels_lie_above_their_controls(planted: Planted) -> None:
    rows = [Explanation(i, quoted(planted, i), "np_max-act", "human") for i in (0, 1, 2)]
    rows += [
        Explanation(3, "in free words about things", "", ""),
        Explanation(4, 'say "cat"', "", ""),
        Explanation(5, 'the word "zebra"', "", ""),
        Explanation(500, '"walk"', "", ""),
    ]
    table, found = scored(planted, rows, {0: Ours("mine", NOTHING), 3: Ours(None, NOTHING)})
    assert (found.explanations, found.covered, found.rows) == (7, 6, 6)
    assert (found.read_as_input, found.read_as_output) == (4, 1)
    assert found.unscored == {
        "in free words": 1,
        "says what it makes the model say": 1,
        "its tokens are not the model's": 1,
    }
    means = {name: method.means["detection"] for name, method in found.methods.items()}
    imported, shuffled, random = means["imported"], means["shuffled"], means["random_sae"]
    assert imported is not None
    assert shuffled is not None
    assert random is not None
    assert imported > 0.9
    assert shuffled < 0.6
    assert random < 0.6
    assert found.methods["imported"].latents == found.methods["imported"].accepted == 3
    assert found.methods["shuffled"].accepted == 0
    assert found.methods["ours"].latents == 1
    assert means["ours"] == 0.5
    assert found.headline["imported_unscored"] == 3

    assert len(table) == 6
    assert all(row.keys() == set(IMPORTED.names) for row in table)
    first, free = table[0], table[3]
    assert (first["our_label"], first["accepted"], first["unscored"]) == ("mine", True, None)
    assert free["unscored"] == "in free words"
    assert free["detection"] is None
    assert free["accepted"] is None


def test_a_wrong_label_fails_and_a_lone_one_has_no_shuffled_control(planted: Planted) -> None:
    _, found = scored(planted, [Explanation(0, quoted(planted, 2), "", "")])
    assert found.methods["imported"].accepted == 0
    assert found.methods["shuffled"].latents == 0
    assert found.methods["shuffled"].means["detection"] is None


def test_nothing_that_can_be_read(planted: Planted) -> None:
    table, found = scored(planted, [Explanation(0, "things", "", "")])
    assert len(table) == 1
    assert found.methods["imported"].latents == 0
    assert found.headline["imported_imported_detection"] is None

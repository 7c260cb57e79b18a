"""Labels of others: what the reader reads, what it leaves unscored, and their controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.imported_labels import (
    IMPORTED,
    OUTPUT_SCORES,
    ImportedLabels,
    Ours,
    score_imported,
    words_of_others,
)
from rldecoder.interp.imported_outputs import Said, of_others
from rldecoder.interp.imported_reader import TokenReader, read_label
from rldecoder.interp.llm.others import JudgedOthers
from rldecoder.interp.neuronpedia_labels import Explanation, Explanations
from rldecoder.interp.output_scores import FAILED
from rldecoder.interp.predicate import Affix, NgramIn, Or, TokenIn
from rldecoder.interp.records import JudgedScores, JudgeTrust, OutputScores
from rldecoder.interp.scores import LabelScores
from rldecoder.interp.vocabulary import Vocabulary

if TYPE_CHECKING:
    from conftest import Planted

NOTHING = LabelScores(
    firings=3, base_rate=0.1, detection=0.5, detection_positive=1, detection_negative=1,
    fuzzing_windows=0, f1=0.25, precision=0.5, fuzzing=None, recall=None, auprc=None,
)  # fmt: skip

RAISES = FAILED.model_copy(
    update={"auroc": 1.0, "auroc_places": 0.9, "drop": 0.5, "drop_low": 0.4, "margin": 0.3,
            "margin_low": 0.2}
)  # fmt: skip
"""Scores that pass."""


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


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('words ending in "-ing" or "ed"', "suffix"),
        ('the suffix "-ing" and the suffix "ed"', None),
        ('tokens that end with "ing" or "ed"', "suffix"),
        ('words beginning with "un" or "re-"', "prefix"),
        ('prefixes "un", "re"', "prefix"),
        ('words that start with "un" or end with "ing"', None),
        ('say words ending in "ing"', None),
        ('verbs ending in "ing"', None),
    ],
)
def test_what_tokens_begin_or_end_with_is_read(text: str, form: str | None) -> None:
    found = read_label(text)
    assert (found.kind is None) == (form is None)
    if form is not None:
        assert found.form == form
        parts = {"suffix": ("ing", "ed"), "prefix": ("un", "re")}[form]
        predicate = TokenReader(Vocabulary(["x"]), lambda _: []).predicate(found.texts, found.form)
        assert isinstance(predicate, Or)
        assert predicate.parts == tuple(Affix(side=found.form, text=part) for part in parts)


def test_what_is_said_first_is_a_set_of_tokens() -> None:
    vocabulary = Vocabulary(["cat", " Cat", " CAT", "s", " do", "g", "\n", " ", "do"])
    spelled = {"dog": [8, 5], " dog": [7, 4, 5], "  ": [7], "gnu": [99], " gnu": [99]}
    reader = TokenReader(vocabulary, lambda text: spelled.get(text, []))
    assert reader.starts(["cat"]) == (0, 1, 2)
    assert reader.starts(["\n"]) == (6,)
    # A space of its own begins anything.
    assert reader.starts(["s", "dog"]) == (3, 4, 8)
    assert reader.starts(["zebra"]) == reader.starts(["gnu"]) == reader.starts(["   "]) == ()


def nothing_raised(
    said: Sequence[Said], rng: np.random.Generator
) -> dict[str, Sequence[OutputScores]]:
    """Only the first label of each latent is right."""
    rows = [held.row for held in said]
    scores = [FAILED if row in rows[:i] else RAISES for i, row in enumerate(rows)]
    failed = [FAILED] * len(said)
    return {"imported": scores, "shuffled": failed, "random_sae": failed}


def scored(
    planted: Planted,
    rows: list[Explanation],
    ours: dict[int, Ours] | None = None,
    judged: JudgedOthers | None = None,
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
        nothing_raised,
        window_tokens=8,
        acceptance=Acceptance(detection=0.8, precision=0.3),
        rng=rng,
        judged=judged,
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
        Explanation(4, 'say "zebra"', "", ""),
        Explanation(5, 'the word "zebra"', "", ""),
        Explanation(500, '"walk"', "", ""),
    ]
    table, found = scored(planted, rows, {0: Ours("mine", NOTHING), 3: Ours(None, NOTHING)})
    assert (found.explanations, found.covered, found.rows) == (7, 6, 6)
    assert (found.read_as_input, found.read_as_output) == (4, 1)
    assert found.unscored == {
        "not judged: in free words": 1,
        "its tokens are not the model's": 2,
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
    assert free["unscored"] == "not judged: in free words"
    assert free["detection"] is None
    assert free["accepted"] is None
    assert first["output_auroc"] is None


def test_output_labels_are_scored_by_ablation(planted: Planted) -> None:
    rows = [
        Explanation(0, quoted(planted, 0), "", ""),
        Explanation(4, 'say "walk"', "", ""),
        Explanation(4, 'say "talk"', "", ""),
        Explanation(5, 'say "jump"', "", ""),
    ]
    ours = {4: Ours("mine", NOTHING, FAILED), 5: Ours("old", NOTHING)}
    table, found = scored(planted, rows, ours)
    assert found.unscored == {}
    accepted = {name: (kind.latents, kind.accepted) for name, kind in found.outputs.items()}
    assert accepted == {
        "imported": (3, 2), "shuffled": (3, 0), "random_sae": (3, 0), "ours": (1, 0),
    }  # fmt: skip
    assert found.outputs["imported"].means["auroc"] == pytest.approx(2 / 3)
    assert found.methods["imported"].latents == 1
    assert found.headline["imported_scored"] == 4
    assert found.headline["imported_shuffled_output_auroc"] == 0
    assert [row["accepted"] for row in table] == [True, True, False, True]
    assert [row["our_output_auroc"] for row in table] == [None, 0, 0, None]
    second = table[1]
    assert [second[f"output_{name}"] for name in OUTPUT_SCORES] == [1, 0.9, 0.5, 0.3]
    assert second["detection"] is None
    assert all(row.keys() == set(IMPORTED.names) for row in table)


@pytest.mark.parametrize("trusted", [True, False])
def test_words_have_what_the_judge_says_of_them(planted: Planted, trusted: bool) -> None:
    """The judge is asked about those in words, most important latents first, up to a bound."""
    rows = [Explanation(i, text, "t", "m") for i, text in enumerate(
        ("verbs", '"walk"', "nouns of places", "odd things", "never asked about")
    )]  # fmt: skip
    found = Explanations("0-res", "planted", rows, 0)
    order = np.array([3, 2, 1, 0, 4])
    words = words_of_others(found, planted.scored.firings.select(order), planted.scored)
    assert words.rows == (0, 1, 3, 4)
    assert words.texts == ("odd things", "nouns of places", "verbs", "never asked about")
    assert words.first(2).texts == ("odd things", "nouns of places")

    def answer(detection: float | None, precision: float) -> JudgedScores:
        return JudgedScores(
            detection=detection, fuzzing=0.5, window_precision=precision, questions=2, failures=0
        )

    # The latents of `scored` lie in the order of their numbers.
    right, wrong, none = answer(0.9, 0.4), answer(0.9, 0.2), answer(None, 0.0)
    trust = JudgeTrust(
        model="judge", trusted=trusted, reason=None, planted=4, bar=0.8, tolerance=0.15,
        questions=1, failures=0,
    )  # fmt: skip
    judged = JudgedOthers(
        [right, wrong, none], {"shuffled": [wrong], "random_sae": []}, {0: wrong, 2: right}, trust
    )
    table, summary = scored(planted, rows, judged=judged)
    assert [row["reading"] for row in table] == ["words", "input", "words", "words", None]
    assert [row["unscored"] for row in table] == [
        None, None, None, "not judged: too few windows", "not judged: in free words",
    ]  # fmt: skip
    assert [row["judged_detection"] for row in table] == [0.9, None, 0.9, None, None]
    assert [row["judge_trusted"] for row in table] == [trusted, None, trusted, trusted, None]
    accepted = [table[i]["accepted"] for i in (0, 2, 3)]
    assert accepted == ([True, False, None] if trusted else [None] * 3)
    counts = {name: (kind.latents, kind.accepted) for name, kind in summary.words.items()}
    assert counts == {
        "imported": (2, trusted), "shuffled": (1, 0), "random_sae": (0, 0), "ours": (2, trusted),
    }  # fmt: skip
    assert summary.headline["imported_imported_judged_detection"] == 0.9
    assert summary.headline["imported_scored"] == 3
    assert all(row.keys() == set(IMPORTED.names) for row in table)


def test_a_label_is_not_its_own_control() -> None:
    for seed in range(20):
        pairs = of_others([0, 0, 1, 2], np.random.default_rng(seed))
        assert pairs
        assert all({place, label} != {0, 1} and place != label for place, label in pairs)
    assert of_others([3], np.random.default_rng(0)) == []
    assert of_others([3, 3], np.random.default_rng(0)) == []


def test_files_of_older_programs_are_read(planted: Planted, tmp_path: Path) -> None:
    _, found = scored(planted, [Explanation(0, quoted(planted, 0), "", "")])
    old = found.model_dump(mode="json")
    del old["outputs"]
    path = tmp_path / "imported_labels.json"
    path.write_text(json.dumps(old), encoding="utf-8")
    read = ImportedLabels.load(path)
    assert read.outputs == {}
    assert read.headline["imported_scored"] == 1
    assert "imported_imported_output_auroc" not in read.headline


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

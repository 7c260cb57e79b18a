"""Windows of text around a latent's strongest activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from rldecoder import open_run
from rldecoder.artifacts.catalogue import ActivationCache
from rldecoder.errors import BadInputError
from rldecoder.interp.contexts import AFTER, BEFORE, HeldOutText
from rldecoder.interp.corpus import Firings, SplitFirings, TokenGrid
from rldecoder.interp.predicate import UNKNOWN
from tests.conftest import ROOT


def text(acts: dict[tuple[int, int, int], float], positions: int = 60) -> HeldOutText:
    """Two sequences, ids 7 and 9; activations by latent (of three), row and position."""
    tokens = np.arange(2 * positions).reshape(2, positions)
    tokens[:, 0] = UNKNOWN
    dense = np.zeros((3, 2 * positions), np.float32)
    for (latent, row, position), act in acts.items():
        dense[latent, row * positions + position] = act
    grid = TokenGrid("test", np.array([7, 9]), tokens, tokens != UNKNOWN, tokens)
    return HeldOutText(
        SplitFirings(grid, Firings(np.arange(3), sparse.csr_array(dense))), lambda t: f"<{t}>"
    )


def test_the_strongest_come_first_one_a_window() -> None:
    held = text(
        {(1, 0, 20): 2.0, (1, 0, 22): 5.0, (1, 1, 3): 3.0, (1, 0, 59): 1.0, (2, 0, 22): 9.0}
    )
    found = held.contexts(1)
    assert (found.latent, found.split, found.firings, found.tokens) == (1, "test", 4, 118)
    assert [(c.seq_id, c.pos, c.act) for c in found.contexts] == [
        (7, 22, 5.0), (9, 3, 3.0), (7, 59, 1.0),
    ]  # fmt: skip
    first, second, last = found.contexts
    assert first.tokens == [f"<{t}>" for t in range(22 - BEFORE, 22 + AFTER + 1)]
    assert first.tokens[first.focus] == "<22>"
    assert first.acts[first.focus] == 5.0
    assert first.acts[first.focus - 2] == 2.0
    assert sum(first.acts) == 7.0
    # A text's beginning has no token at the sink, its end none behind it.
    assert second.tokens[0] == "<61>"
    assert second.tokens[second.focus] == "<63>"
    assert last.tokens[-1] == "<59>"
    assert [c.pos for c in held.contexts(1, count=1).contexts] == [22]


def test_a_silent_latent_has_none_and_an_unknown_one_is_refused() -> None:
    held = text({})
    assert held.contexts(0).contexts == []
    with pytest.raises(BadInputError, match="no latent 3"):
        held.contexts(3)


def test_a_run_finds_any_latent_in_text_that_no_label_saw(debug_store: Path) -> None:
    run = open_run(ROOT / "configs" / "debug.yaml", debug_store)
    cache = run.artifact(ActivationCache)
    (batch,) = cache.reader("test").ordered(10**6, columns=("resid",))
    assert batch.resid is not None
    dense = run.sae().encode_dense(batch.resid.float()).numpy()
    unlabelled = [latent for latent in dense.max(0).argsort()[::-1] if latent not in run.labels]
    latent = int(unlabelled[0])
    found = run.contexts(latent)
    assert found.firings == int((dense[:, latent] > 0).sum()) > 0
    assert found.tokens == len(dense)
    strongest = int(dense[:, latent].argmax())
    best = found.contexts[0]
    assert (best.seq_id, best.pos) == (int(batch.seq_id[strongest]), int(batch.pos[strongest]))
    assert best.act == pytest.approx(float(dense[strongest, latent]), rel=1e-4)
    token = int(batch.token_id[strongest])
    assert best.tokens[best.focus] == run.lm().tokenizer.decode([token])
    assert run.contexts(latent, split="label").split == "label"

"""Public signatures name arrays, and tests hold calls to them; nothing else does."""

import re

import pytest
import torch
from jaxtyping import TypeCheckError

from rldecoder.axes import AXES
from rldecoder.rl import core
from rldecoder.rl.critic import Critic
from rldecoder.sae.metrics import near_duplicate_fraction
from rldecoder.sae.sparse_ops import Pairs
from tests.array_checks import CALLS_A_TEST, NAMES_ARRAY, PACKAGES
from tests.conftest import ROOT

B, T = 3, 5


def test_a_wrong_shape_is_refused() -> None:
    core.k1(torch.zeros(B, T), torch.zeros(B, T))
    with pytest.raises(TypeCheckError, match="k1"):
        core.k1(torch.zeros(B, T), torch.zeros(B, T + 1))


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="share_consistency"):
        core.share_consistency(torch.zeros(B, T), torch.zeros(B, T), torch.zeros(B).long())


def test_what_is_returned_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_share_entropy", lambda contributions: contributions)
    with pytest.raises(TypeCheckError, match=r"return value of .*effective_latents"):
        core.effective_latents(torch.ones(B, T))


def test_methods_and_decorated_functions_are_held_to_it() -> None:
    with pytest.raises(TypeCheckError, match="of_mask"):
        Pairs.of_mask(torch.zeros(B, T))
    with pytest.raises(TypeCheckError, match="near_duplicate_fraction"):
        near_duplicate_fraction(torch.zeros(T), 0.9)
    with pytest.raises(TypeCheckError, match="forward"):
        Critic(T, 2, seed=0)(torch.zeros(B, T).long())


def test_only_the_first_calls_of_a_test_are_checked() -> None:
    for _ in range(CALLS_A_TEST):
        core.k3(torch.zeros(B), torch.zeros(B))
    core.k3(torch.zeros(B), torch.zeros(B, 1))


def test_the_next_test_starts_anew() -> None:
    with pytest.raises(TypeCheckError):
        core.k3(torch.zeros(B), torch.zeros(B, 1))


def test_nothing_is_checked_outside_tests() -> None:
    for package in ("rldecoder", "tasks", "flows"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r"beartype|import_hook|jaxtyped", path.read_text("utf-8")), path


def test_every_axis_has_its_meaning_in_one_place() -> None:
    files = [path for name in PACKAGES for path in (ROOT / name.replace(".", "/")).rglob("*.py")]
    named = re.compile(NAMES_ARRAY.pattern + r'[\w.]+, "([^"]*)"\]')
    found = [axes for path in files for _, axes in named.findall(path.read_text("utf-8"))]
    assert len(found) > 100
    used = {axis.lstrip("*#") for axes in found for axis in axes.split()}
    # `_` and `...` are axes of any length, which have no name.
    assert used - {"1", "_", "..."} == set(AXES)

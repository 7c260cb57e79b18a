"""The Jacobian lens against products of linear maps, and against autograd through whole texts."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rldecoder.errors import NumericalError
from rldecoder.lm import cut, jacobian
from rldecoder.lm.cut import replaced_input
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.jacobian import JacobianMap, JacobianSums, draw_contexts, jacobian_sums, obstacle
from rldecoder.seeds import torch_generator
from tests.tiny_models import ARCHITECTURES, WIDTH, tiny_frozen

LAYERS = [0, 1, 3]
CONTEXTS = torch.randint(1, 512, (3, 9), generator=torch.Generator().manual_seed(0))


def fit_jacobians(lm: FrozenLM, layers: list[int]) -> dict[int, JacobianMap]:
    """The Jacobian lens of each layer, added up as the stage does."""
    runs = CONTEXTS.split(jacobian.POSITIONS_AT_ONCE)
    parts = [jacobian_sums(lm, layers, ids, lambda rows: None) for ids in runs]
    return {
        layer: reduce(JacobianSums.plus, [part[layer] for part in parts]).mean(len(CONTEXTS))
        for layer in layers
    }


class Linear(nn.Module):
    """A block that adds a linear map of its input, whatever stands before."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights, requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states + hidden_states @ self.weights.T


def test_of_linear_blocks_it_is_the_product_of_their_maps(tiny_lm_dir: Path) -> None:
    lm = tiny_frozen("gpt2", tiny_lm_dir, 3)
    blocks = lm.part_after(0), lm.part_after(1), lm.part_after(2)
    parent = lm.base.get_submodule("h")
    maps = 0.2 * torch.randn(len(blocks), WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    for number, weights in enumerate(maps):
        parent.set_submodule(str(number), Linear(weights))
    found = fit_jacobians(lm, LAYERS)
    first, second, third = maps + torch.eye(WIDTH)
    torch.testing.assert_close(found[0].J, third @ second @ first)
    torch.testing.assert_close(found[1].J, third @ second)
    assert torch.equal(found[3].J, torch.eye(WIDTH))
    assert all(one.relative_error < 1e-3 and one.positions == 3 for one in found.values())

    # Such a model says nothing else than its lens, from every layer.
    seen, final = lm.residuals(CONTEXTS)
    for layer in LAYERS:
        torch.testing.assert_close(found[layer](lm, seen[layer]), final, atol=1e-4, rtol=1e-4)


def jacobian_through_the_text(lm: FrozenLM, ids: Tensor, layer: int) -> Tensor:
    """[D, D] of one text [S]: what is added to its last residual at `layer`, into the last norm."""

    def last(step: Tensor) -> Tensor:
        met: list[Tensor] = []

        def add(resid: Tensor) -> Tensor:
            changed = resid.clone()
            changed[0, -1] += step
            return changed

        def keep(resid: Tensor) -> Tensor:
            met.append(resid[0, -1])
            return resid

        with (
            replaced_input(lm.part_after(layer), add),
            replaced_input(lm.part_after(lm.num_layers), keep),
        ):
            lm.base(input_ids=ids[None], use_cache=False)
        return met[0]

    found = torch.autograd.functional.jacobian(last, torch.zeros(lm.d_model))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mean_and_its_error_are_those_of_whole_texts(
    architecture: str, tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_frozen(architecture, tiny_lm_dir, 3)
    monkeypatch.setattr(jacobian, "POSITIONS_AT_ONCE", 2)
    monkeypatch.setattr(jacobian, "TOKENS_AT_ONCE", 10)  # five dimensions, then ten: 32 has rests
    found = fit_jacobians(lm, [1, 2])
    for layer in (1, 2):
        single = np.stack([jacobian_through_the_text(lm, ids, layer) for ids in CONTEXTS])
        mean = single.mean(0)
        np.testing.assert_allclose(found[layer].J, mean, atol=1e-4 * np.abs(mean).max())
        error = np.linalg.norm(single.std(0, ddof=1)) / len(single) ** 0.5 / np.linalg.norm(mean)
        assert found[layer].relative_error == pytest.approx(error, rel=1e-3)
        assert error > 0.01


def test_contexts_end_where_text_is_usual() -> None:
    ids = torch.arange(2 * 12).reshape(2, 12)
    drawn = draw_contexts(ids, 12, torch_generator(0, "x"), front=(7, 20))
    # Windows of six of each sequence's twelve tokens, all different, none across the seam.
    assert drawn.shape == (12, 6)
    assert {int(row[-1]) for row in drawn} == {*range(5, 12), *range(17, 24)} - {7, 20}
    assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 6)) for row in drawn)
    assert torch.equal(drawn, draw_contexts(ids, 12, torch_generator(0, "x"), front=(7, 20)))
    # More than there are: again from the beginning.
    assert draw_contexts(ids, 25, torch_generator(0, "x")).shape == (25, 6)
    assert draw_contexts(torch.zeros(1, 500), 1, torch_generator(0, "x")).shape == (1, 64)


def test_what_stands_in_the_way_is_named(
    tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_frozen("llama", tiny_lm_dir, 2)
    assert obstacle(lm, 0) is None
    with monkeypatch.context() as patch:
        patch.setattr(cut, "_KEPT", {})  # a kind of block that nothing is known of
        assert "above layer 1 blocks keep no cache" in str(obstacle(lm, 1))
    with monkeypatch.context() as patch:
        patch.setattr(jacobian, "keeps_states", lambda config: config is lm.base.config)
        assert "overwrite" in str(obstacle(lm, 1))
    monkeypatch.setattr(jacobian, "is_offloaded", lambda model: True)
    assert "offloaded" in str(obstacle(lm, 0))


def test_a_broken_model_has_no_lens(tiny_lm_dir: Path) -> None:
    lm = tiny_frozen("gpt2", tiny_lm_dir, 2)
    lm.base.get_submodule("h").set_submodule("1", Linear(torch.full((WIDTH, WIDTH), torch.nan)))
    with pytest.raises(NumericalError, match="Jacobian lens could not be computed"):
        fit_jacobians(lm, [1])

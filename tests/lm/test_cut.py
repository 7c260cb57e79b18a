"""Cutting a model between its blocks, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rldecoder.errors import BadInputError
from rldecoder.lm.cut import find_parts, replaced_input, with_blocks
from rldecoder.lm.frozen import FrozenLM
from tests.tiny_models import ARCHITECTURES, WIDTH, tiny_frozen

DEPTH = 4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest, tiny_lm_dir: Path) -> FrozenLM:
    return tiny_frozen(request.param, tiny_lm_dir, DEPTH)


@torch.no_grad()
def test_blocks_run_alone_give_what_they_give_in_the_model(lm: FrozenLM) -> None:
    ids = torch.randint(1, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    seen, final = lm.residuals(ids)
    # Blocks 2 and 3 at the door of block 2: once with the final norm, once without.
    for norm, expected in ((True, final), (False, seen[DEPTH])):
        cut = with_blocks(lm.base, [2, 3], norm=norm)
        blocks_name, _ = find_parts(cut)
        first = cut.get_submodule(blocks_name).get_submodule("0")
        with replaced_input(first, lambda _: seen[2]):
            out = cut(inputs_embeds=torch.zeros(2, 9, WIDTH), use_cache=False).last_hidden_state
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_cut_shares_parameters_and_leaves_the_model_whole(lm: FrozenLM) -> None:
    blocks_name, norm_name = find_parts(lm.base)
    cut = with_blocks(lm.base, [3, 1], norm=False)
    blocks, theirs = (model.get_submodule(blocks_name) for model in (cut, lm.base))
    assert all(
        block is theirs.get_submodule(name)
        for block, name in zip(blocks.children(), "31", strict=True)
    )
    assert isinstance(cut.get_submodule(norm_name), nn.Identity)
    assert not isinstance(lm.base.get_submodule(norm_name), nn.Identity)
    assert (cut.config.num_hidden_layers, lm.base.config.num_hidden_layers) == (2, DEPTH)
    assert sum(1 for _ in theirs.children()) == DEPTH
    layer_types = getattr(lm.base.config, "layer_types", None)
    if layer_types is not None:
        assert cut.config.layer_types == [layer_types[3], layer_types[1]]


def test_a_model_without_one_list_of_blocks_is_refused(lm: FrozenLM) -> None:
    cut = with_blocks(lm.base, [0])
    cut.config.num_hidden_layers = 3
    with pytest.raises(BadInputError, match="are not supported"):
        find_parts(cut)


def test_the_door_is_closed_again_after_an_error(lm: FrozenLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = lm.residuals(ids)[1]
    first = lm.base.get_submodule(find_parts(lm.base)[0]).get_submodule("0")
    with pytest.raises(RuntimeError, match="inside"), replaced_input(first, torch.zeros_like):
        raise RuntimeError("inside")
    assert torch.equal(lm.residuals(ids)[1], before)

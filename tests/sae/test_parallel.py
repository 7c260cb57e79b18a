"""What processes of a training exchange. tests/stages/test_train_together.py has them at work."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from rldecoder.errors import NoResourceError
from rldecoder.sae.parallel import Group


def test_one_process_exchanges_nothing() -> None:
    group, value = Group(), torch.ones(3, requires_grad=True)
    assert torch.equal(group.mean(value), value)
    assert not group.mean(value).requires_grad
    assert torch.equal(group.slice(value), value)
    assert group.total(5) == 5
    group.agree([value])
    group.meet()


def test_slices_are_disjoint_and_of_one_length() -> None:
    x = torch.arange(11)
    parts = [Group(rank, 3).slice(x).tolist() for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_an_exchange_that_fails_says_that_peers_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(tensor: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr(dist, "all_reduce", closed)
    with pytest.raises(NoResourceError, match=r"lost the others.*Connection closed by peer"):
        Group(0, 2).mean(torch.ones(1))

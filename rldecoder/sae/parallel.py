"""Data-parallel SAE training on one machine: a process a device, each with a slice of every batch.

The first process is the caller's own: it alone reports, checkpoints and publishes. All hold the
same weights and take the same steps, for gradients are averaged, and `batchtopk` and `matryoshka`
choose among the tokens of all; sums run in another order than in one process, so results agree to
rounding, not to the bit. torch's DDP wraps a module whose loss is a mean over tokens; here the
choice among tokens, the dead latents and two of the losses are of the whole batch, too.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from rldecoder.errors import NoResourceError

_PATIENCE = datetime.timedelta(minutes=10)
"""How long a process waits for the others in one exchange; a dead one is noticed by then."""


class Group:
    """What a process exchanges with its peers. Alone, every exchange is the identity."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def slice(self, batch: Shaped[Tensor, "tokens ..."]) -> Shaped[Tensor, "some ..."]:
        """This process's rows of a batch [N, D]; all slices are of one length."""
        return batch[self.rank : len(batch) // self.size * self.size : self.size]

    def mean(self, tensor: Float[Tensor, " *axes"]) -> Float[Tensor, " *axes"]:
        """The mean over processes, without gradient."""
        if self.size == 1:
            return tensor.detach()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def total(self, count: int) -> int:
        """The sum over processes."""
        if self.size == 1:
            return count
        # On the device of the exchange: nccl takes no CPU tensors.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return round(float(self.mean(torch.tensor(float(count), device=device))) * self.size)

    def largest(self, values: Float[Tensor, " pairs"], count: int) -> Float[Tensor, " some"]:
        """The `count` largest values [M] of all processes, descending; each has its own M."""
        mine = values.topk(min(count, len(values))).values
        if self.size == 1:
            return mine
        padded = mine.new_full((count,), -torch.inf)
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded)
        return torch.cat(everyone).topk(count).values

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Replace every gradient by its mean over processes, in place."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(self.mean(parameter.grad))

    def any(self, mask: Bool[Tensor, " *axes"]) -> Bool[Tensor, " *axes"]:
        """Where the mask is true in some process."""
        return mask if self.size == 1 else self.mean(mask.float()) > 0


@contextmanager
def peers(
    size: int, work: Callable[..., None], arguments: tuple[Any, ...], device: torch.device
) -> Iterator[tuple[Group, torch.device]]:
    """Run `work(group, device, *arguments)` in `size - 1` other processes beside the block.

    Args:
        size: processes in all; with 1 nothing is started.
        work: a module-level function; it must make the same exchanges as the block does.
        arguments: plain values.
        device: of this process; others take the next CUDA devices, or the CPU as well.

    Raises:
        NoResourceError: there are fewer CUDA devices than processes.
    """
    if size == 1:
        yield Group(), device
        return
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise NoResourceError(
            f"{size} processes were asked for; {torch.cuda.device_count()} devices are visible.",
            "Every process needs a device of its own.",
            "Lower `train_sae.processes`, or make more devices visible.",
        )

    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        others = start_processes(
            _join, (size, meeting, device.type, work, arguments), size - 1,
            join=False, start_method="spawn",
        )  # fmt: skip
        try:
            _meet(0, size, meeting, device.type)
            yield Group(0, size), _device(0, device.type)
            while not others.join():
                pass
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for process in others.processes:
                process.kill()


def _join(
    index: int,
    size: int,
    meeting: str,
    kind: str,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """What every process but the first runs."""
    torch.set_num_threads(1)
    _meet(index + 1, size, meeting, kind)
    work(Group(index + 1, size), _device(index + 1, kind), *arguments)
    dist.destroy_process_group()
    # Gloo's threads may still free tensors; while the interpreter is torn down that aborts the
    # process (pytorch/pytorch#179291), and a training that is done would count as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _meet(rank: int, size: int, meeting: str, kind: str) -> None:
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=size, timeout=_PATIENCE
    )


def _device(rank: int, kind: str) -> torch.device:
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)

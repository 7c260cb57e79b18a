"""Data-parallel SAE training: what processes exchange that each have a slice of every batch.

All hold the same weights and take the same steps, for gradients are averaged, and `batchtopk` and
`matryoshka` choose among the tokens of all; sums run in another order than in one process, so
results agree to rounding, not to the bit. torch's DDP wraps a module whose loss is a mean over
tokens; here the choice among tokens, the dead latents and two of the losses are of the whole
batch, too. Who starts the processes is `rldecoder.executors.teams`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from rldecoder.errors import NoResourceError
from rldecoder.failures import shown


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
        with _exchange():
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
        with _exchange():
            dist.all_gather(everyone, padded)
        return torch.cat(everyone).topk(count).values

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over processes, in place."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1:
            return
        with _exchange():
            # All at once: while one is added up, the next is on its way.
            for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
                work.wait()
        for gradient in gradients:
            gradient /= self.size

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Take over the first process's values, in place: what it saves is what all hold."""
        if self.size == 1:
            return
        with torch.no_grad(), _exchange():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def meet(self) -> None:
        """Wait until all have come here."""
        self.total(1)

    def any(self, mask: Bool[Tensor, " *axes"]) -> Bool[Tensor, " *axes"]:
        """Where the mask is true in some process."""
        return mask if self.size == 1 else self.mean(mask.float()) > 0


@contextmanager
def _exchange() -> Iterator[None]:
    """Whatever torch raises in an exchange, a peer is gone, or hangs."""
    try:
        yield
    except RuntimeError as error:
        raise NoResourceError(
            "A process of the training lost the others.",
            shown(error),
            "Look at the system's log, and run again: it goes on from its last checkpoint.",
        ) from error

"""The RL buffer: text on which the KL and sparsity losses are taken beside the rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader, ShuffledActivations
from rldecoder.data.activations import ActivationBatch, VectorColumn
from rldecoder.decoder.distill import LogitBuffers, chunked_kl_ce
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.sequences import hidden_of_resid, slopes_along
from rldecoder.rl import core
from rldecoder.sae.model import Sae
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse

COLUMNS: tuple[VectorColumn, ...] = ("resid", "final_hidden")


class ReplayBatch(NamedTuple):
    """Text tokens on which the KL loss is taken too."""

    latents: SparseLatents
    """[N, K]"""
    frozen_hidden: Tensor
    """[N, D]"""
    seq_id: Tensor
    """[N]"""
    pos: Tensor
    """[N]"""


def text_losses(
    decoder: SaeDecoderForCausalLM, text: ReplayBatch, buffers: LogitBuffers, *, entropy: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
    """Mean KL(frozen || decoder) on replayed text, in nats a token, and if it is asked for the mean
    contribution entropy of the decoder's own first choices there. The blocks run once for both;
    the slopes that contributions are taken along get no gradient."""
    resid = decode_sparse(text.latents, decoder.W, decoder.b)
    hidden = hidden_of_resid(decoder, resid, text.seq_id, text.pos)
    lm = decoder.frozen.lm
    losses = chunked_kl_ce(hidden, text.frozen_hidden, lm, buffers=buffers, choices=entropy)
    if losses.choices is None:
        return losses.loss.mean(), None
    slopes = slopes_along(decoder, losses.choices, hidden, resid, keep_graph=True)
    used = decoder.along(text.latents, slopes)
    return losses.loss.mean(), core.contribution_entropy(used).mean()


class Replay:
    """Training text for these losses: one batch an optimiser step, the same for the same step.

    The text is read in shuffled windows, and again when it ends; the number of the step is the
    cursor. A stream gives whole sequences to every decoder: how many rows its shards have, and so
    where a row would be, is only known once they are computed.

    Args:
        text: the activations of its tokens, from the cache or a stream.
        sae: encodes them.
        num_tokens: a batch.
        seed: of the order.
        sequences: whole sequences, for decoders that look back; else rows from anywhere.
    """

    def __init__(
        self,
        text: ShuffledActivations,
        sae: Sae,
        num_tokens: int,
        seed: int,
        *,
        sequences: bool = False,
    ) -> None:
        self.sae, self.seed = sae, seed
        self.num_tokens = min(num_tokens, text.num_tokens)
        self._shuffled: Callable[..., Iterator[ActivationBatch]]
        if isinstance(text, ActivationReader) and not sequences:
            self._shuffled, self._size = text.shuffled, self.num_tokens
            self._batches_per_epoch = text.batches_per_epoch(self.num_tokens)
        else:
            size = max(1, self.num_tokens // text.meta.context_length)
            self._shuffled, self._size = text.shuffled_sequences, size
            self._batches_per_epoch = text.sequence_batches(size)
        self._next_update = -1
        self._batches: Iterator[ActivationBatch] = iter(())

    @torch.no_grad()
    def __call__(self, update: int) -> ReplayBatch:
        """The batch of an optimiser step, encoded."""
        epoch, place = divmod(update, self._batches_per_epoch)
        if update != self._next_update or place == 0:
            self._batches = self._shuffled(
                self._size,
                seed=self.seed,
                epoch=epoch,
                start_batch=place,
                columns=COLUMNS,
            )
        self._next_update = update + 1
        batch = next(self._batches).to(self.sae.W_dec.device)
        assert batch.resid is not None
        assert batch.final_hidden is not None
        latents = self.sae.encode(batch.resid.float())
        return ReplayBatch(latents, batch.final_hidden, batch.seq_id, batch.pos)

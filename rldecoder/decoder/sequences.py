"""Cached rows and sequences: a decoder with blocks reads the second, everything else the first.

Rows are cached without position 0 and without other attention sinks. In a grid those places hold
no latent; position 0 stays visible (the blocks read their learned sink there), the others do not.

Axes: N rows, B sequence, T position, K active latents, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch, VectorColumn, concatenate
from rldecoder.decoder.distill import chunk_rows
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse


def hidden_of_rows(
    decoder: SaeDecoderForCausalLM,
    latents: SparseLatents,
    seq_id: Int[Tensor, " tokens"],
    pos: Int[Tensor, " tokens"],
) -> Float[Tensor, "tokens d_model"]:
    """Predicted final hidden states [N, D] of N rows of whole sequences.

    Args:
        decoder: of either kind.
        latents: [N, K].
        seq_id: [N], rows of one sequence side by side.
        pos: [N] positions, rising within a sequence.
    """
    return hidden_of_resid(decoder, decode_sparse(latents, decoder.W, decoder.b), seq_id, pos)


def hidden_of_resid(
    decoder: SaeDecoderForCausalLM,
    resid: Float[Tensor, "tokens d_model"],
    seq_id: Int[Tensor, " tokens"],
    pos: Int[Tensor, " tokens"],
) -> Float[Tensor, "tokens d_model"]:
    """The same from what the rows' latents add up to, [N, D]."""
    return decoder.upper.of_rows(resid, seq_id, pos)


@torch.enable_grad()
def slopes_of_choices(
    decoder: SaeDecoderForCausalLM,
    latents: SparseLatents,
    seq_id: Int[Tensor, " tokens"],
    pos: Int[Tensor, " tokens"],
) -> Float[Tensor, "tokens d_model"]:
    """What a step along each row's residual gives the decoder's own first choices: [N, D].

    `decoder.along(latents, slopes)` is then what each latent adds to them, above what it adds to
    the mean logit: for `linear` its exact part in its own token's logit; with blocks, to first
    order, also its part in later ones.

    Args: as in `hidden_of_rows`.
    """
    lm = decoder.frozen.lm
    resid = decode_sparse(latents, decoder.W, decoder.b).detach().requires_grad_()
    hidden = hidden_of_resid(decoder, resid, seq_id, pos)
    parts = hidden.detach().split(chunk_rows(lm.vocab_size))
    chosen = torch.cat([lm.unembed(part).argmax(-1) for part in parts])
    return slopes_along(decoder, chosen, hidden, resid)


def slopes_along(
    decoder: SaeDecoderForCausalLM,
    chosen: Int[Tensor, " tokens"],
    hidden: Float[Tensor, "tokens d_model"],
    resid: Float[Tensor, "tokens d_model"],
    *,
    keep_graph: bool = False,
) -> Float[Tensor, "tokens d_model"]:
    """The same for given choices where the decoder has run already: [N, D], detached.

    Args:
        chosen: [N] token ids.
        hidden: [N, D] predicted, from `resid`, with its graph.
        resid: [N, D] what the latents add up to.
        keep_graph: whether the graph is needed again.
    """
    directions = decoder.frozen.lm.choice_directions(chosen).to(hidden.dtype)
    (slopes,) = torch.autograd.grad((hidden * directions).sum(), resid, retain_graph=keep_graph)
    return slopes


def in_parts(batch: ActivationBatch, max_tokens: int) -> Iterator[ActivationBatch]:
    """A batch in parts of at most `max_tokens` rows, cut only between sequences.

    A sequence that is longer makes a part by itself.
    """
    cuts = (batch.seq_id.diff() != 0).nonzero()[:, 0] + 1
    ends = torch.cat([cuts, cuts.new_tensor([len(batch.seq_id)])])
    start = 0
    while start < len(batch.seq_id):
        later = ends[ends > start]
        fitting = later[later <= start + max_tokens]
        stop = int(fitting[-1] if len(fitting) else later[0])
        yield batch.select(torch.arange(start, stop))
        start = stop


def whole_sequences(
    reader: ActivationReader,
    batch_tokens: int,
    *,
    columns: Sequence[VectorColumn],
    max_tokens: int | None = None,
) -> Iterator[ActivationBatch]:
    """Rows in order, in batches that begin with a sequence; the last sequence may be cut short.

    Args:
        reader: the split.
        batch_tokens: rows a batch, give or take a sequence.
        columns: vectors to read.
        max_tokens: stop after this many rows (None: all).
    """
    held: ActivationBatch | None = None
    for batch in reader.ordered(batch_tokens, columns=columns, max_tokens=max_tokens):
        joined = batch if held is None else concatenate([held, batch])
        open_rows = joined.seq_id == joined.seq_id[-1]
        held = joined.select(open_rows)
        if not open_rows.all():
            yield joined.select(~open_rows)
    if held is not None:
        yield held

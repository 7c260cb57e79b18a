"""The faithfulness frontier: KL against hook layer, decoder depth and k.

Every decoder has the same token budget. Beside it stand the floor (the frozen model's own upper
blocks on the SAE's reconstruction: splice KL), an affine map of the bare residual, and a decoder of
the greatest depth on a random SAE. Formulas: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import pyarrow as pa
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.faithfulness import Predictor, lens_predictor
from rldecoder.decoder.loading import AffineLens, decoder_from_lens
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.lens import RIDGE_STRENGTHS, AffineMap, Moments, choose_affine
from rldecoder.sae.model import Sae
from rldecoder.schemas import JsonRecord, Scalar, optional, table_schema

_ROWS = 4096


class FrontierCell(JsonRecord):
    """One decoder on test text; KL in nats per token."""

    layer: int
    """Whose residual the SAE reads."""
    k: int
    """The SAE's active latents per token."""
    expansion: float
    """The SAE's latents per dimension of the residual."""
    depth: int
    """The decoder's blocks; 0 is linear."""
    sae: Literal["trained", "random"]
    """The control reads a random SAE of the same L0."""
    start_kl: float
    """KL(frozen || decoder) before training."""
    kl: float
    """The same after it."""
    kl_low: float
    """95 % interval of `kl`, lower end."""
    kl_high: float
    """95 % interval of `kl`, upper end."""
    agreement: float
    """Share of tokens on which both have the same first choice."""
    splice_kl: float
    """The floor: KL(frozen || its own upper blocks on the reconstruction)."""
    residual_lens_kl: float
    """KL(frozen || affine lens on the bare residual)."""
    parameters: int
    """Trained weights of the decoder."""
    flops_per_token: float
    """From latents to logits."""
    tokens_trained: int
    """Over all epochs."""
    train_seconds: float
    """Wall clock."""


CELLS = table_schema(FrontierCell, parameters=pa.int64(), tokens_trained=pa.int64())
"""A `FrontierCell` a row."""


class FrontierVerdict(JsonRecord):
    """Which layer to decode, with how many blocks."""

    meets_limit: bool | None
    """Whether a decoder is faithful enough; None where no frontier was asked for."""
    why: str
    """For people."""
    depths: dict[int, int]
    """By layer, the least depth that meets the limit, else the best."""
    layer: int | None = optional()
    """Recommended; absent where no frontier was asked for."""
    k: int | None = optional()
    """Of the best decoder there; absent where no frontier was asked for."""
    depth: int | None = optional()
    """Recommended there; absent where no frontier was asked for."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        return self.model_dump(include={"layer", "depth"})


@torch.no_grad()
def fit_lens(lm: FrozenLM, reader: ActivationReader, sae: Sae | None = None) -> AffineMap:
    """The best affine map from the cached residual, or its reconstruction, to the final hidden.

    The last eighth of every batch of 4,096 rows chooses the ridge strength.
    """
    sums = (Moments(lm.d_model, lm.device), Moments(lm.d_model, lm.device))
    for batch in reader.ordered(_ROWS, columns=("resid", "final_hidden")):
        assert batch.resid is not None
        assert batch.final_hidden is not None
        x, y = batch.resid.to(lm.device).float(), batch.final_hidden.to(lm.device)
        if sae is not None:
            x = sae(x).recon
        cut = len(x) - len(x) // 8
        sums[0].add(x[:cut], y[:cut])
        sums[1].add(x[cut:], y[cut:])
    return choose_affine(*sums, RIDGE_STRENGTHS)


def linear_start(lm: FrozenLM, sae: Sae, reader: ActivationReader) -> SaeDecoderForCausalLM:
    """The linear decoder at the best affine map of the SAE's reconstruction."""
    found = fit_lens(lm, reader, sae)
    return decoder_from_lens(lm, sae, AffineLens(found.A, found.c))


def residual_predictor(lm: FrozenLM, reader: ActivationReader) -> Predictor:
    """The affine lens on the bare residual: what no SAE stands before."""
    found = fit_lens(lm, reader)
    return lens_predictor(found.A, found.c)


def num_parameters(decoder: SaeDecoderForCausalLM) -> int:
    """Trained weights."""
    return sum(parameter.numel() for parameter in decoder.parameters())


def flops_per_token(decoder: SaeDecoderForCausalLM, active: float, context: int) -> float:
    """Multiply-adds, counted twice, from latents to logits for one token.

    k rows of W; every weight of the blocks and maps once; scores and sums of attention over half
    the context on average; the unembedding. The trunk and the SAE's encoder are not counted.
    """
    config, upper = decoder.config, decoder.upper
    flops = 2 * active * config.d_model + 2 * config.vocab_size * config.d_model
    flops += 2 * sum(p.numel() for p in upper.parameters() if p.ndim == 2)
    return flops + 2 * config.d_model * context * len(upper.numbers)


def recommend(cells: Iterable[FrontierCell], max_kl: float) -> FrontierVerdict:
    """For each layer the least depth that meets `max_kl`, and the layer to decode.

    Among cells of one layer and depth the best k counts. Where no depth is enough, the depth with
    the least KL. The layer recommended is the earliest that meets the limit, for the earlier the
    layer, the more of the model's computation an explanation covers; else the one of least KL.

    Args:
        cells: of the SAEs, not of the controls.
        max_kl: nats per token.
    """
    best: dict[int, FrontierCell] = {}
    for cell in sorted(cells, key=lambda cell: (cell.layer, cell.depth, cell.kl)):
        known = best.get(cell.layer)
        if known is None or (known.kl > max_kl and cell.kl < known.kl):
            best[cell.layer] = cell

    able = [layer for layer, cell in best.items() if cell.kl <= max_kl]
    layer = min(able) if able else min(best, key=lambda layer: best[layer].kl)
    chosen, limit = best[layer], f"a KL of {max_kl:g} nats"
    why = (
        f"layer {layer} is the earliest from which a decoder reaches {limit}, "
        f"with {chosen.depth} blocks"
        if able
        else f"no decoder reaches {limit}; from layer {layer} with {chosen.depth} blocks "
        f"it is {chosen.kl:.2f}"
    )
    return FrontierVerdict(
        meets_limit=bool(able),
        why=why,
        layer=layer,
        k=chosen.k,
        depth=chosen.depth,
        depths={number: cell.depth for number, cell in sorted(best.items())},
    )

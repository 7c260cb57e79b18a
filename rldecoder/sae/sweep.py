"""Small SAEs at several layers and sizes, trained in memory on the same tokens and compared.

A sweep chooses; it does not replace the training of the SAE that is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rldecoder.config.sae import SweepSaeConfig, TrainSaeConfig
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.lens import (
    RIDGE_STRENGTHS,
    Moments,
    PredictionMeans,
    PredictionSums,
    choose_affine,
    compare_predictions,
)
from rldecoder.lm.sinks import SKIP_FIRST, is_sink
from rldecoder.sae.metrics import random_control, reconstruction_quality
from rldecoder.sae.model import Sae
from rldecoder.sae.splice import splice_quality
from rldecoder.sae.training import SaeTrainer, input_statistics, published_spec
from rldecoder.schemas import JsonRecord, Scalar, optional, table_schema
from rldecoder.seeds import derive_seed, torch_generator

_CHUNK_TOKENS = 256
_ENCODE_TOKENS = 4096


class LayerData(NamedTuple):
    """Tokens of one split at one layer, sinks and first positions left out."""

    resid: Tensor
    """[N, D] bfloat16"""
    final_hidden: Tensor
    """[N, D] bfloat16: normed hidden state that the unembedding reads."""
    targets: Tensor
    """[N] the next tokens."""


class Setting(NamedTuple):
    """What is varied between the cells of a sweep."""

    layer: int
    """Whose residual stream is read."""
    k: int
    """Active latents per token."""
    expansion: float
    """Latents per dimension of the residual."""

    @property
    def key(self) -> str:
        """Its name in seeds and in progress."""
        return f"{self.layer}/{self.k}/{self.expansion:g}"

    @property
    def folder(self) -> str:
        """The name of its SAE's folder."""
        return f"layer-{self.layer}-k-{self.k}-x{self.expansion:g}"


class Quality(JsonRecord):
    """How good one small SAE is; KL in nats per token."""

    fvu: float
    """Fraction of variance unexplained on test tokens."""
    l0: float
    """Mean number of active latents."""
    dead_fraction: float
    """Share of latents that no test token activates."""
    splice_kl: float
    """KL(frozen || frozen model on the reconstruction)."""
    decoder_kl: float
    """KL(frozen || closed-form affine lens on the reconstruction)."""
    decoder_agreement: float
    """Share of tokens on which that lens has the frozen model's first choice."""
    residual_lens_kl: float
    """KL of the same lens on the bare residual, which loses nothing."""
    random_sae_kl: float
    """KL of the same lens on a random SAE of the same L0."""


class _Varied(JsonRecord):
    layer: int
    """Whose residual stream is read."""
    k: int
    """Active latents per token."""
    expansion: float
    """Latents per dimension of the residual."""


class SweepCell(Quality, _Varied):
    """One setting, and the quality of its SAE; the setting is the first columns of CELLS."""

    @property
    def setting(self) -> Setting:
        """What was set."""
        return Setting(self.layer, self.k, self.expansion)


CELLS = table_schema(SweepCell)
"""A `SweepCell` a row."""


class SweepVerdict(JsonRecord):
    """The cell to go on with."""

    meets_limits: bool | None
    """Whether it meets the configured limits; None where no sweep was asked for."""
    why: str
    """For people."""
    cell: SweepCell | None = optional()
    """The cell, absent where no sweep was asked for."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        if self.cell is None:
            return {}
        return {
            "layer": self.cell.layer,
            "decoder_kl": self.cell.decoder_kl,
            "meets_limits": self.meets_limits,
        }


def collect(
    lm: FrozenLM,
    input_ids: Int[Tensor, "sequences length"],
    layers: Sequence[int],
    micro_batch: int,
    advance: Callable[[int], None],
) -> dict[int, LayerData]:
    """Residuals of several layers in one pass over sequences [S, T]."""
    parts: dict[int, list[LayerData]] = {layer: [] for layer in layers}
    for ids in input_ids.split(micro_batch):
        here = ids.to(lm.device)
        seen, final = lm.residuals(here)
        for layer in layers:
            resid = seen[layer][:, SKIP_FIRST:-1].flatten(0, 1)
            usual = ~is_sink(resid, here[:, SKIP_FIRST:-1].flatten(), lm.front)
            kept = LayerData(
                resid[usual].to("cpu", torch.bfloat16),
                final[:, SKIP_FIRST:-1].flatten(0, 1)[usual].to("cpu", torch.bfloat16),
                here[:, SKIP_FIRST + 1 :].flatten()[usual].cpu(),
            )
            parts[layer].append(kept)
        advance(ids.numel())
    return {
        layer: LayerData(*(torch.cat(column) for column in zip(*found, strict=True)))
        for layer, found in parts.items()
    }


def train_small(
    data: Float[Tensor, "tokens d_model"],
    config: TrainSaeConfig,
    seed: int,
    *,
    hook_layer: int,
    model_name: str,
    after_step: Callable[[], None],
    device: torch.device | str = "cpu",
) -> Sae:
    """Train an SAE on rows [N, D] held in memory; it stays on `device`."""
    spec = published_spec(config, data.shape[1], hook_layer=hook_layer, model_name=model_name)
    num_steps = max(1, config.budget_tokens // config.batch_tokens)
    generator = torch_generator(seed, "order")
    order = torch.empty(0, dtype=torch.int64)
    probe = torch.randperm(len(data), generator=torch_generator(seed, "probe"))
    statistics = input_statistics(data[probe[: config.init_tokens]])
    trainer = SaeTrainer(spec, config, num_steps, statistics, seed, device)
    for _ in range(num_steps):
        if len(order) < config.batch_tokens:
            order = torch.randperm(len(data), generator=generator)
        trainer.step(data[order[: config.batch_tokens]])
        order = order[config.batch_tokens :]
        after_step()
    return trainer.sae()


def measure(
    lm: FrozenLM,
    sae: Sae,
    train: LayerData,
    test: LayerData,
    sequences: Int[Tensor, "sequences length"],
    seed: int,
) -> Quality:
    """Quality of one SAE, and what an affine decoder of its reconstructions reaches.

    The decoder is the closed-form affine lens on the reconstruction: a floor of what training the
    feature decoder gives, cheap enough for every cell. The same lens on the raw residual (what
    the SAE loses nothing of) and on a random SAE of the same L0 stand beside it.
    """
    quality = reconstruction_quality(sae, test.resid.split(_ENCODE_TOKENS))
    device = lm.device
    sample = test.resid[:_ENCODE_TOKENS].to(device)
    control = random_control(sae.spec, derive_seed(seed, "control"), sample, quality.l0_mean)
    layer = sae.spec.hook_layer
    splice = splice_quality(lm, sequences, layer, {"sae": lambda resid: sae(resid).recon})
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "sae": lambda resid: sae(resid.to(device)).recon,
        "residual": lambda resid: resid.to(device).float(),
        "random": lambda resid: control(resid.to(device)).recon,
    }
    reached = {name: affine_decoder(lm, view, train, test) for name, view in views.items()}
    return Quality(
        fvu=quality.fvu,
        l0=quality.l0_mean,
        dead_fraction=float((quality.density == 0).double().mean()),
        splice_kl=splice.replaced["sae"].kl,
        decoder_kl=reached["sae"].kl,
        decoder_agreement=reached["sae"].agreement,
        residual_lens_kl=reached["residual"].kl,
        random_sae_kl=reached["random"].kl,
    )


@torch.no_grad()
def affine_decoder(
    lm: FrozenLM, view: Callable[[Tensor], Tensor], train: LayerData, test: LayerData
) -> PredictionMeans:
    """The best affine map from a view of the residual to the final hidden state, on `test`.

    A tenth of `train` chooses the ridge strength.
    """
    held = max(1, len(train.resid) // 10)
    moments = []
    for rows in (slice(held, None), slice(held)):
        sums = Moments(lm.d_model, lm.device)
        pairs = zip(
            train.resid[rows].split(_ENCODE_TOKENS),
            train.final_hidden[rows].split(_ENCODE_TOKENS),
            strict=True,
        )
        for resid, final in pairs:
            sums.add(view(resid), final)
        moments.append(sums)
    lens = choose_affine(moments[0], moments[1], RIDGE_STRENGTHS)
    predicted = torch.cat([lens(view(part)) for part in test.resid.split(_ENCODE_TOKENS)])
    found = {"frozen": PredictionSums(), "lens": PredictionSums()}
    compare_predictions(
        lm,
        test.final_hidden.to(lm.device, lm.dtype),
        {"lens": predicted},
        test.targets.to(lm.device),
        found,
        _CHUNK_TOKENS,
    )
    return found["lens"].means()


def choose(cells: Sequence[SweepCell], config: SweepSaeConfig) -> SweepVerdict:
    """The cell to go on with, and why.

    The earliest layer that still meets both limits: the earlier the layer, the more of the
    model's computation an explanation covers. Within it, the least decoder KL. Where no cell
    meets them, the least decoder KL of all.
    """
    able = [
        cell
        for cell in cells
        if cell.decoder_kl <= config.max_decoder_kl and cell.splice_kl <= config.max_splice_kl
    ]
    limits = (
        f"decoder KL <= {config.max_decoder_kl:g} and splice KL <= {config.max_splice_kl:g} nats"
    )
    if able:
        layer = min(cell.layer for cell in able)
        chosen = min((c for c in able if c.layer == layer), key=lambda cell: cell.decoder_kl)
        why = f"layer {layer} is the earliest that meets {limits}"
    else:
        chosen = min(cells, key=lambda cell: cell.decoder_kl)
        why = f"no cell meets {limits}; this one has the least decoder KL"
    return SweepVerdict(meets_limits=bool(able), why=why, cell=chosen)

"""Method B: a small set encoder that points at features of a prediction.

The encoder reads the candidate features of one prediction as a set. For each it gives a pointer
(how much it matters), a predicted effect of removing it, and how sure it is that the intervention
will bear that out. It can name nothing but what it was given, so it cannot invent a feature.

Axes: B position, C candidate, M intervention, D model width, L latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rldecoder import schemas
from rldecoder.config.base import Config
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.explain.patching import Candidates, noise_floor
from rldecoder.sae.model import Sae

SCALARS_PER_SLOT = 9
ROW_WIDTH = 64
FILES = ("explainer.json", "explainer.safetensors")
_TINY = 1e-4


class ExplainerSpec(Config):
    """Shape and units of an explainer."""

    d_model: int = Field(gt=0)
    """Width of the model, and of the SAE's rows."""
    num_latents: int = Field(gt=0)
    """Number of dictionary columns."""
    max_candidates: int = Field(gt=0)
    """Candidates a position."""
    max_claims: int = Field(gt=0)
    """Most claims an explanation makes."""
    width: int = Field(gt=0)
    """Hidden width."""
    num_layers: int = Field(gt=0)
    """Attention layers."""
    effect_unit: float = Field(gt=0)
    """Root mean square of the training effects, nats: the unit the model computes in."""
    min_effect: float = Field(ge=0)
    """Effects up to this many nats are of no use to a reader and are not claimed."""


class Slots(NamedTuple):
    """The explainer's input for B positions."""

    scalars: Tensor
    """[B, C, 9]: see `make_slots`."""
    rows: Tensor
    """[B, C, D]: the features' directions in the residual stream, of unit length."""
    mask: Tensor
    """[B, C] bool: real candidates."""
    attributions: Tensor
    """[B, C]: first-order effects, nats."""
    noise: Tensor
    """[B, C]: effects up to this many nats are not told from chance."""


class Pointers(NamedTuple):
    """The explainer's output for B positions."""

    logits: Tensor
    """[B, C]: pointer logits, -inf for padding."""
    sure: Tensor
    """[B, C]: log odds that the intervention will bear the predicted effect out; see `losses`."""
    effects: Tensor
    """[B, C]: predicted effect, nats, positive supports."""
    noise: Tensor
    """[B, C]: as in the input."""


class Explainer(nn.Module):
    """The pointer model, with the tables it needs.

    Buffers `scales` [L] (usual high of each activation) and `importance` [L] (mean |attribution|
    over domains) travel with the weights.
    """

    scales: Tensor
    importance: Tensor

    def __init__(self, spec: ExplainerSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.row_projection = nn.Linear(spec.d_model, ROW_WIDTH)
        self.slot_encoder = nn.Sequential(
            nn.Linear(SCALARS_PER_SLOT + ROW_WIDTH, width), nn.GELU(), nn.Linear(width, width)
        )
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.set_encoder = nn.TransformerEncoder(
            layer, spec.num_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.heads = nn.Linear(width, 3)
        """Corrections of pointer, sureness and effect: all start from the first-order estimate."""
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        self.register_buffer("scales", torch.zeros(spec.num_latents))
        self.register_buffer("importance", torch.zeros(spec.num_latents))

    def forward(self, slots: Slots) -> Pointers:
        """Pointers and effects of B positions; a permutation of the slots permutes them."""
        unit = self.spec.effect_unit
        inputs = torch.cat([slots.scalars, self.row_projection(slots.rows)], dim=-1)
        # A position without any candidate would give NaN attention: it attends to its padding.
        ignored = ~slots.mask & slots.mask.any(-1, keepdim=True)
        encoded = self.set_encoder(self.slot_encoder(inputs), src_key_padding_mask=ignored)
        pointer, sure, effect = self.heads(encoded).unbind(-1)

        size = slots.attributions.abs()
        logits = (size / unit + _TINY).log() + pointer
        effects = slots.attributions + unit * effect
        return Pointers(
            logits.masked_fill(~slots.mask, float("-inf")),
            self._above_floor(size, slots.noise) + sure,
            effects * slots.mask,
            slots.noise,
        )

    def _above_floor(self, size: Tensor, noise: Tensor) -> Tensor:
        """Log odds that an effect of this estimated size counts, before anything is learnt."""
        floor = noise.clamp_min(max(self.spec.min_effect, _TINY))
        return 2 * ((size + _TINY) / floor).log()

    def choose(self, pointers: Pointers) -> Tensor:
        """Which candidates become claims: bool [B, C], at most `max_claims` a row.

        A claim is more likely than not to be borne out, ranks among the first, and its predicted
        effect is one that chance does not explain. A position may have none.
        """
        size = pointers.effects.abs()
        floor = pointers.noise.clamp_min(self.spec.min_effect)
        allowed = (size > floor) & (pointers.sure > 0) & pointers.logits.isfinite()
        order = pointers.logits.masked_fill(~allowed, float("-inf")).argsort(-1, descending=True)
        rank = order.argsort(-1)
        return allowed & (rank < self.spec.max_claims)

    def save(self, folder: Path) -> None:
        """Write `explainer.json` and `explainer.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        schemas.write_json(folder / FILES[0], self.spec.model_dump(mode="json"))
        tensors = {name: value.detach().cpu().contiguous() for name, value in
                   self.state_dict().items()}  # fmt: skip
        save_file(tensors, folder / FILES[1])

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Explainer:
        """Read a folder written by `save`.

        Raises:
            BadInputError: there is no explainer in the folder.
            DamagedFileError: a file cannot be read, or the weights do not fit the spec.
        """
        for name in FILES:
            if not (folder / name).is_file():
                raise BadInputError(
                    f"There is no explainer in {folder}.",
                    f"{name} is missing.",
                    "Run the pipeline until one is trained: `rldecoder run CONFIG`.",
                )
        explainer = cls(ExplainerSpec.model_validate(schemas.read_json(folder / FILES[0])))
        try:
            explainer.load_state_dict(load_file(folder / FILES[1]))
        except (SafetensorError, RuntimeError) as error:
            raise DamagedFileError(
                f"The explainer in {folder} cannot be loaded.", str(error), "Rebuild its stage."
            ) from error
        return explainer.to(device).eval().requires_grad_(False)


class LossParts(NamedTuple):
    """The terms of one step's loss, each a scalar without unit."""

    pointer: Tensor
    """Cross-entropy of the pointers against each candidate's share of the exact |effects|."""
    effect: Tensor
    """Smooth L1 of predicted against exact single effects."""
    sure: Tensor
    """Cross-entropy of the sureness against the verdicts on what was predicted."""


def make_slots(explainer: Explainer, sae: Sae, candidates: Candidates) -> Slots:
    """The explainer's input from candidates [B, C].

    Scalars a slot: log activation, activation over its usual high, contribution, attribution,
    share of all |attribution|, attribution over what chance does, log importance, log p of the
    token, row length.
    """
    unit = explainer.spec.effect_unit
    acts, attributions = candidates.acts, candidates.attributions
    mask = acts > 0

    rows = F.embedding(candidates.indices, sae.W_dec.detach()).float()
    norms = rows.norm(dim=-1)
    noise = noise_floor(candidates, norms)
    scales = explainer.scales[candidates.indices]
    normalised = torch.where(scales > 0, acts / scales.clamp_min(_TINY), 0.0).clamp(max=4.0)
    total = (attributions.abs() * mask).sum(-1, keepdim=True).clamp_min(_TINY)
    importance = explainer.importance[candidates.indices]

    # Effects span orders of magnitude and both signs: asinh is linear near 0 and a log far off.
    scalars = torch.stack(
        [
            acts.log1p(),
            normalised,
            (candidates.contributions / unit).asinh(),
            (attributions / unit).asinh(),
            attributions.abs() / total,
            ((attributions.abs() + _TINY) / noise.clamp_min(_TINY)).log().clamp(-4, 4),
            (importance / unit + _TINY).log() / 10,
            candidates.logprobs[:, None].expand_as(acts),
            norms.log1p(),
        ],
        dim=-1,
    )
    unit_rows = rows / norms.clamp_min(_TINY)[..., None] * explainer.spec.d_model**0.5
    return Slots(scalars * mask[..., None], unit_rows, mask, attributions * mask, noise * mask)


def supported(effects: Tensor, predicted: Tensor, noise: Tensor, min_effect: float) -> Tensor:
    """Which measured effects bear out what was predicted: its sign, above chance and `min_effect`.

    Args:
        effects, predicted, noise: of one shape; nats.
    """
    return (effects * predicted.sign()) > noise.clamp_min(min_effect)


def losses(explainer: Explainer, slots: Slots, single: Tensor) -> LossParts:
    """The loss terms of B positions.

    Args:
        single: [B, C], exact effects of single removals, nats.
    """
    unit = explainer.spec.effect_unit
    pointers = explainer(slots)

    share = single.abs() * slots.mask
    share = share / share.sum(-1, keepdim=True).clamp_min(_TINY)
    logprob = pointers.logits.log_softmax(-1).masked_fill(~slots.mask, 0.0)
    pointer = -(share * logprob).sum(-1).mean()

    num = slots.mask.sum().clamp_min(1)
    error = F.smooth_l1_loss(pointers.effects / unit, single / unit, reduction="none")
    effect = (error * slots.mask).sum() / num
    held = supported(single, pointers.effects.detach(), slots.noise, explainer.spec.min_effect)
    surprise = F.binary_cross_entropy_with_logits(
        pointers.sure, held.to(pointers.sure.dtype), reduction="none"
    )
    return LossParts(pointer, effect, (surprise * slots.mask).sum() / num)

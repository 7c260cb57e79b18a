"""Method B: a small set encoder that points at features, and a reconstructor that checks it.

The encoder reads the candidate features of one prediction as a set. For each it gives a
pointer (claim it or not) and a predicted effect of removing it. It can name nothing but what it
was given, so it cannot invent a feature. The reconstructor reads the claims, and only the
claims, and must predict what interventions do: claims that leave out what matters cost loss.

Axes: B position, C candidate, M intervention, D model width, L latents, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rldecoder import schemas
from rldecoder.config.base import Config
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.explain.patching import Candidates, noise_floor

SCALARS_PER_SLOT = 8
ROW_WIDTH = 64
FILES = ("explainer.json", "explainer.safetensors")
_TINY = 1e-4


class ExplainerSpec(Config):
    """Shape and units of an explainer."""

    d_model: int = Field(gt=0)
    """Width of the decoder's rows."""
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
    """[B, C, 8]: see `make_slots`."""
    rows: Tensor
    """[B, C, D]: unit decoder rows."""
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
    gates: Tensor
    """[B, C] in 0..1: whether to claim."""
    effects: Tensor
    """[B, C]: predicted effect, nats, positive supports."""
    noise: Tensor
    """[B, C]: as in the input."""


class Explainer(nn.Module):
    """The pointer model and its reconstructor, with the tables they need.

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
        self.pointer_head = nn.Linear(width, 1)
        self.effect_head = nn.Linear(width, 1)
        # At the start candidates with more than an eighth of the typical effect are claimed.
        self.gate_bias = nn.Parameter(torch.tensor(2.0))
        self.reconstructor = Reconstructor()
        # Both heads correct the first-order estimate, so they start from no correction.
        for head in (self.pointer_head, self.effect_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.register_buffer("scales", torch.zeros(spec.num_latents))
        self.register_buffer("importance", torch.zeros(spec.num_latents))

    def forward(self, slots: Slots) -> Pointers:
        """Pointers and effects of B positions; a permutation of the slots permutes them."""
        unit = self.spec.effect_unit
        inputs = torch.cat([slots.scalars, self.row_projection(slots.rows)], dim=-1)
        # A position without any candidate would give NaN attention: it attends to its padding.
        ignored = ~slots.mask & slots.mask.any(-1, keepdim=True)
        encoded = self.set_encoder(self.slot_encoder(inputs), src_key_padding_mask=ignored)
        prior = (slots.attributions.abs() / unit + _TINY).log()
        logits = prior + self.pointer_head(encoded)[..., 0]
        gates = (logits + self.gate_bias).sigmoid() * slots.mask
        effects = slots.attributions + unit * self.effect_head(encoded)[..., 0]
        return Pointers(
            logits.masked_fill(~slots.mask, float("-inf")),
            gates,
            effects * slots.mask,
            slots.noise,
        )

    def choose(
        self, pointers: Pointers, *, gated: bool = True
    ) -> Bool[Tensor, "places candidates"]:
        """Which candidates become claims: bool [B, C], at most `max_claims` a row.

        A claim needs an open gate, a rank among the first, and a predicted effect that chance
        does not explain. A position may have none.

        Args:
            gated: False takes every gate as open.
        """
        size = pointers.effects.abs()
        allowed = (size > pointers.noise) & (size > self.spec.min_effect)
        if gated:
            allowed &= pointers.gates > 0.5
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


class Reading(NamedTuple):
    """What a reader of the claims expects of B x M interventions."""

    effects: Tensor
    """[B, M], in the unit of the claims."""
    change: Tensor
    """[B, M]: log odds that the most likely token will be another one."""


class Reconstructor(nn.Module):
    """Predicts what an intervention does from the claims alone.

    The effect starts as the sum of the claimed strengths that the intervention removes, and
    learns how removals interact (the softmax saturates). The log odds of another first choice
    start from that sum and the claims' p.
    """

    HIDDEN = 32

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(4, self.HIDDEN), nn.GELU())
        self.together = nn.Sequential(nn.Linear(self.HIDDEN + 2, self.HIDDEN), nn.GELU())
        self.correction = nn.Linear(self.HIDDEN, 2)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)
        # Another token leads, roughly, when p falls below a half: effect - log p > log 2.
        self.change = nn.Linear(2, 1)
        with torch.no_grad():
            self.change.weight.copy_(torch.tensor([[1.0, -1.0]]))
            self.change.bias.fill_(-math.log(2))

    def forward(
        self,
        claimed: Float[Tensor, "places candidates"],
        effects: Float[Tensor, "places candidates"],
        removals: Float[Tensor, "places interventions candidates"],
        logprobs: Float[Tensor, " places"],
    ) -> Reading:
        """Predicted effects, in the unit of `effects`, and log odds of a change, [B, M] each.

        Args:
            claimed: [B, C], 1 for claims; slots with 0 add nothing.
            effects: [B, C], claimed effects.
            removals: [B, M, C], removed shares.
            logprobs: [B], log p of the output token.
        """
        share = removals * claimed[:, None]
        removed = share * effects[:, None]
        total = removed.sum(-1, keepdim=True)
        level = logprobs[:, None, None].expand(*removals.shape)
        facts = torch.stack([effects[:, None].expand_as(share), share, removed, level], dim=-1)
        pooled = (self.each(facts) * claimed[:, None, :, None]).sum(-2)
        level_once = logprobs[:, None, None].expand(*total.shape)
        learnt = self.correction(self.together(torch.cat([pooled, total, level_once], dim=-1)))
        change = self.change(torch.cat([total, level_once], dim=-1))[..., 0] + learnt[..., 1]
        return Reading(total[..., 0] + learnt[..., 0], change)


class LossParts(NamedTuple):
    """The terms of one step's loss, each a scalar without unit."""

    pointer: Tensor
    """Cross-entropy of the pointers against each candidate's share of the exact |effects|."""
    effect: Tensor
    """Smooth L1 of predicted against exact single effects."""
    reconstruction: Tensor
    """Smooth L1 of joint effects predicted from the claims alone."""
    outcome: Tensor
    """Cross-entropy of the first choice's change, predicted from the claims alone."""
    length: Tensor
    """Mean number of claims (sum of gates)."""


def make_slots(
    explainer: Explainer, decoder: SaeDecoderForCausalLM, candidates: Candidates
) -> Slots:
    """The explainer's input from candidates [B, C].

    Scalars a slot: log activation, activation over its usual high, contribution, attribution,
    share of all |attribution|, log importance, log p of the token, normalised row length.
    """
    unit = explainer.spec.effect_unit
    acts, attributions = candidates.acts, candidates.attributions
    mask = acts > 0

    rows = F.embedding(candidates.indices, decoder.W.detach()).float()
    norms = rows.norm(dim=-1)
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
            (importance / unit + _TINY).log() / 10,
            candidates.logprobs[:, None].expand_as(acts),
            norms.log1p(),
        ],
        dim=-1,
    )

    unit_rows = rows / norms.clamp_min(_TINY)[..., None] * explainer.spec.d_model**0.5
    noise = noise_floor(candidates, norms)
    return Slots(scalars * mask[..., None], unit_rows, mask, attributions * mask, noise)


def losses(
    explainer: Explainer,
    slots: Slots,
    logprobs: Float[Tensor, " places"],
    single: Float[Tensor, "places candidates"],
    removals: Float[Tensor, "places interventions candidates"],
    joint: Float[Tensor, "places interventions"],
    changed: Bool[Tensor, "places interventions"],
    *,
    regularised: bool = True,
) -> LossParts:
    """The loss terms of B positions.

    Args:
        logprobs: [B], log p of the output token.
        single: [B, C], exact effects of single removals, nats.
        removals, joint: [B, M, C] and [B, M], interventions and their exact effects, nats.
        changed: [B, M] bool, whether the most likely token is another one after each.
        regularised: whether the reconstruction error has a say in what is claimed; the
            reconstructor learns in either case.
    """
    unit = explainer.spec.effect_unit
    pointers = explainer(slots)

    share = single.abs() * slots.mask
    share = share / share.sum(-1, keepdim=True).clamp_min(_TINY)
    logprob = pointers.logits.log_softmax(-1).masked_fill(~slots.mask, 0.0)
    pointer = -(share * logprob).sum(-1).mean()
    error = F.smooth_l1_loss(pointers.effects / unit, single / unit, reduction="none")
    effect = (error * slots.mask).sum() / slots.mask.sum().clamp_min(1)

    # Straight-through: the claims are hard choices, their gradient is the gates'. Strengths are
    # detached: they must stay what was measured, not become a code for the reconstructor.
    # Without the regulariser nothing pays for an open gate: the length term closes them all, and
    # the reconstructor would have nothing to learn from. So there the gates have no say.
    hard = explainer.choose(pointers, gated=regularised).float()
    claimed = hard + pointers.gates - pointers.gates.detach() if regularised else hard
    strengths = pointers.effects.detach() / unit

    predicted = explainer.reconstructor(claimed, strengths, removals, logprobs)
    reconstruction = F.smooth_l1_loss(predicted.effects, joint / unit)
    outcome = F.binary_cross_entropy_with_logits(predicted.change, changed.to(joint.dtype))
    return LossParts(pointer, effect, reconstruction, outcome, pointers.gates.sum(-1).mean())

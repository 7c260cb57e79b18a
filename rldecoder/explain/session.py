"""Explaining one prompt: frozen prediction, decoder's prediction, Method A, checked Method B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import last_of_text
from rldecoder.errors import BadInputError
from rldecoder.explain.claims import (
    CheckedClaim,
    Claim,
    explanation_text,
    judge,
    noise_on_frozen,
    verify_on_decoder,
    verify_on_frozen,
)
from rldecoder.explain.explainer import Explainer, make_slots
from rldecoder.explain.explanation import Explanation, Prediction, Sanity
from rldecoder.explain.inputs import LabelText, read_labels
from rldecoder.explain.patching import find_candidates, measure
from rldecoder.explain.ranking import rank_active, ranking_text
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SparseLatents

TOP_TOKENS = 3


@dataclass(frozen=True)
class Session:
    """Loaded models, ready to explain any number of prompts."""

    lm: FrozenLM
    sae: Sae
    decoder: SaeDecoderForCausalLM
    labels: Mapping[int, LabelText]
    explainer: Explainer

    def explain(self, prompt: str) -> Explanation:
        """See `explain_prompt`."""
        return explain_prompt(self.lm, self.sae, self.decoder, self.labels, self.explainer, prompt)

    def explain_ids(self, ids: Tensor) -> Explanation:
        """See `explain_ids`; the prompt is what the tokens [T] say."""
        prompt = str(self.lm.tokenizer.decode(ids))
        return explain_ids(
            self.lm, self.sae, self.decoder, self.labels, self.explainer, ids, prompt
        )


def load_session(
    *,
    model: Path,
    sae: Path,
    decoder: Path,
    labels: Path,
    explainer: Path,
    device: torch.device | str = "cpu",
) -> Session:
    """Load what the stages published, the frozen model in float32.

    Args:
        model, sae, decoder: folders of the frozen model, the SAE and the final decoder.
        labels: `feature_labels.json`.
        explainer: folder of the explainer.
    """
    # Whatever the stages computed in: a claim's effect is a small difference, which a residual
    # rounded to bfloat16 after its edit would lose.
    lm = FrozenLM.load(model, device=device, dtype=torch.float32)
    loaded_sae = Sae.load(sae, device=device)
    return Session(
        lm,
        loaded_sae,
        load_decoder(decoder, lm, loaded_sae),
        read_labels(labels),
        Explainer.load(explainer, device=device),
    )


def explain_prompt(
    lm: FrozenLM,
    sae: Sae,
    decoder: SaeDecoderForCausalLM,
    labels: Mapping[int, LabelText],
    explainer: Explainer,
    prompt: str,
) -> Explanation:
    """Explain the decoder's next token after `prompt`; every claim is tested on both models.

    Raises:
        BadInputError: the prompt is empty or longer than the model's context.
    """
    return explain_ids(lm, sae, decoder, labels, explainer, encode_prompt(lm, prompt), prompt)


@torch.no_grad()
def explain_ids(
    lm: FrozenLM,
    sae: Sae,
    decoder: SaeDecoderForCausalLM,
    labels: Mapping[int, LabelText],
    explainer: Explainer,
    ids: Tensor,
    prompt: str,
) -> Explanation:
    """Explain the decoder's next token after the tokens `ids` [T], T >= 2.

    Args:
        prompt: what to show as the text.
    """
    tokens = tuple(token_text(lm, token) for token in ids.tolist())
    _, final = lm.resid_and_final(ids[None], sae.spec.hook_layer)
    frozen_logprobs = lm.unembed(final[0, -1]).log_softmax(-1)
    trace = decoder.features(ids[None]).latents
    latents = SparseLatents(trace.acts[0, -1], trace.indices[0, -1])
    logprobs = decoder.logits(trace)[0, -1].log_softmax(-1)
    ranked = rank_active(latents.acts, latents.indices, explainer.scales, labels)
    claims, sanity = _checked_claims(decoder, explainer, labels, ids, tokens, trace)
    return Explanation(
        prompt=prompt,
        tokens=tokens,
        frozen=_prediction(lm, frozen_logprobs),
        decoder=_prediction(lm, logprobs),
        kl=float((frozen_logprobs.exp() * (frozen_logprobs - logprobs)).sum()),
        method_a=ranking_text(ranked),
        ranked=tuple(ranked),
        claims=claims,
        method_b=explanation_text([checked.claim for checked in claims]),
        sanity=sanity,
    )


def encode_prompt(lm: FrozenLM, prompt: str) -> Tensor:
    """Token ids [T] as in `tokenize_prompt`, no more than the model can read.

    Raises:
        BadInputError: the prompt is empty or longer than the model's context.
    """
    ids = tokenize_prompt(lm, prompt)
    longest = lm.context_length
    if len(ids) > longest:
        raise BadInputError(
            f"The prompt has {len(ids):,} tokens.",
            f"The model reads at most {longest:,}.",
            "Shorten the prompt.",
        )
    return ids


def tokenize_prompt(lm: FrozenLM, prompt: str) -> Tensor:
    """Token ids [T], T >= 2: the first position is an attention sink that no SAE was trained on.

    Raises:
        BadInputError: the prompt is empty.
    """
    ids = lm.encode_prompt(prompt)
    if ids == lm.encode_prompt(""):
        raise BadInputError(
            "The prompt is empty.", "There is no token to predict from.", "Write some text."
        )
    if len(ids) < 2:
        ids = [lm.eos_token_id, *ids]
    return torch.tensor(ids, device=lm.device)


def token_text(lm: FrozenLM, token: int) -> str:
    """What a token says, raw: escape it before showing."""
    return str(lm.tokenizer.decode([token]))


def _prediction(lm: FrozenLM, logprobs: Tensor) -> Prediction:
    best = logprobs.topk(TOP_TOKENS)
    top = tuple(
        (token_text(lm, token), p)
        for token, p in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    )
    return Prediction(top[0][0], int(best.indices[0]), top[0][1], top)


def _checked_claims(
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    labels: Mapping[int, LabelText],
    ids: Tensor,
    tokens: tuple[str, ...],
    trace: SparseLatents,
) -> tuple[tuple[CheckedClaim, ...], Sanity | None]:
    """Method B at the last position, its claims tested on the decoder and the frozen model."""
    text = SparseLatents(trace.acts[0], trace.indices[0])
    here = last_of_text(text)
    candidates = find_candidates(decoder, here, explainer.spec.max_candidates)
    pointers = explainer(make_slots(explainer, decoder, candidates))
    chosen = explainer.choose(pointers)[0]
    if not bool(chosen.any()):
        return (), None
    slots = pointers.logits[0].masked_fill(~chosen, float("-inf")).argsort(descending=True)
    slots = slots[: int(chosen.sum())]
    named = candidates.indices[0, slots].tolist()
    token = int(candidates.tokens[0])
    last = SparseLatents(text.acts[-1], text.indices[-1])
    effects = verify_on_decoder(decoder, text, token, named)
    frozen_effects = verify_on_frozen(decoder, ids, last, token, named)
    frozen_noises = noise_on_frozen(decoder, ids, last, token, named)
    checked = []
    for slot, latent, effect, frozen_effect, frozen_noise in zip(
        slots.tolist(), named, effects, frozen_effects, frozen_noises, strict=True
    ):
        predicted = float(pointers.effects[0, slot])
        position = _evidence(trace, latent)
        label = labels.get(latent, LabelText(None, None))
        claim = Claim(
            latent=latent,
            label=label.quoted,
            label_confidence=label.confidence,
            evidence_position=position,
            evidence_text=tokens[position],
            direction="supports" if predicted > 0 else "opposes",
            strength=abs(predicted),
            output_token=token_text(decoder.frozen.lm, token),
            probability=float(candidates.logprobs[0].exp()),
            noise=max(float(pointers.noise[0, slot]), explainer.spec.min_effect),
        )
        bar = max(frozen_noise, claim.noise)
        verdict = judge(predicted, effect, claim.noise, frozen_effect, bar)
        checked.append(CheckedClaim(claim, effect, verdict, frozen_effect, bar))
    # Others: the strongest active features that no claim names, as many as there are claims.
    ordered = torch.arange(len(chosen), device=chosen.device)
    others = ordered[~chosen & (candidates.acts[0] > 0)][: len(slots)]
    removals = torch.zeros(1, 2, len(chosen), device=chosen.device)
    removals[0, 0, slots], removals[0, 1, others] = 1.0, 1.0
    joint = measure(decoder, here, candidates, removals).joint[0]
    unit = explainer.spec.effect_unit
    reading = explainer.reconstructor(
        chosen[None].float(), pointers.effects / unit, removals[:, :1], candidates.logprobs
    )
    predicted_joint = reading.effects
    return tuple(checked), Sanity(float(joint[0]), unit * float(predicted_joint), float(joint[1]))


def _evidence(trace: SparseLatents, latent: int) -> int:
    """The position where a latent is most active; 0, the attention sink, is left out."""
    acts = (trace.acts[0] * (trace.indices[0] == latent)).sum(-1)
    return int(acts[1:].argmax()) + 1

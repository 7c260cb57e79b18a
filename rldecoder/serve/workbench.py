"""What the server computes: a prompt token by token, and what one changed feature does.

No intervention is estimated. It scales one latent's activation at one position; the decoder is
run again from the edited latents, and the frozen model from the residual stream at the hook layer
with `(factor - 1) * act * W_dec[latent]` added at that position. The SAE's error term stays in
place, so that nothing but the feature changes.

Axes: T position, K active latents, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rldecoder.errors import BadInputError
from rldecoder.explain.claims import verify_on_decoder
from rldecoder.explain.ranking import RankedFeature, rank_active
from rldecoder.explain.session import Explanation, Session, token_text, tokenize_prompt
from rldecoder.sae.model import SparseLatents

TOP_TOKENS = 5
TOP_FEATURES = 5
KEPT_PROMPTS = 4
"""Prompts whose residuals stay in memory, so that a click need not run the model again."""


class Choice(NamedTuple):
    """One token that a model may say next, raw text."""

    token: str
    token_id: int
    probability: float


class TokenTrace(NamedTuple):
    """One position of a prompt and what both models predict after it."""

    token: str
    """Raw text."""
    frozen: list[Choice]
    decoder: list[Choice]
    kl: float
    """KL(frozen || decoder), nats."""
    actual: tuple[float, float] | None
    """Probability of the token that follows, by frozen model and decoder; None at the end."""
    features: list[RankedFeature]
    """The strongest; none at position 0, an attention sink that no SAE was trained on."""
    num_active: int


class ActiveFeature(NamedTuple):
    """One active feature of a position, with what its removal does there."""

    ranked: RankedFeature
    effect: float
    """Measured: log p(the decoder's token) - log p(it without the feature), nats."""


class PositionDetail(NamedTuple):
    """All active features of one position, strongest first."""

    features: list[ActiveFeature]
    token: Choice
    """The decoder's most likely next token, which the effects are about."""


class Shift(NamedTuple):
    """One token's probability before and after a change."""

    token: str
    """Raw text."""
    token_id: int
    before: float
    after: float


class Change(NamedTuple):
    """One model before and after an intervention, at the position of the intervention."""

    shifts: list[Shift]
    """The most likely tokens before, and then those that came to be among them after."""
    effect: float
    """log p before - after of the token most likely before, nats: > 0 when the change makes it
    less likely."""
    moved: list[float]
    """KL(before || after) at this and every later position, nats."""


class Intervention(NamedTuple):
    """What happens when one activation is scaled."""

    latent: int
    act: float
    """Before, in the SAE's units."""
    new_act: float
    decoder: Change
    frozen: Change


class _Reading(NamedTuple):
    """What one pass of the frozen model over a prompt gives, without the batch axis."""

    resid: Tensor
    """[T, D] at the hook layer."""
    final: Tensor
    """[T, D]"""
    latents: SparseLatents
    """[T, K]"""


class Workbench:
    """Loaded models and the questions that the page asks. Not for several threads at once.

    Args:
        session: as `explain` loads it.
        max_tokens: longest prompt; the work and the memory grow with it.
    """

    def __init__(self, session: Session, *, max_tokens: int) -> None:
        self.session = session
        self.max_tokens = min(max_tokens, session.lm.context_length)
        self._read = lru_cache(maxsize=KEPT_PROMPTS)(self._read_anew)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """The prompt's token ids, at least two.

        Raises:
            BadInputError: it is empty or too long.
        """
        ids = tokenize_prompt(self.session.lm, prompt)
        if len(ids) > self.max_tokens:
            raise BadInputError(
                f"The prompt has {len(ids):,} tokens.",
                f"This server takes at most {self.max_tokens:,}.",
                "Shorten it, or start `rldecoder serve` with a larger --max-tokens.",
            )
        return tuple(ids.tolist())

    @torch.no_grad()
    def trace(self, ids: tuple[int, ...]) -> list[TokenTrace]:
        """Every position of a prompt, the last one included."""
        session, lm = self.session, self.session.lm
        read = self._read(ids)
        frozen = lm.unembed(read.final).log_softmax(-1)
        decoder = session.decoder.logits(_alone(read.latents))[0].log_softmax(-1)
        kl = (frozen.exp() * (frozen - decoder)).sum(-1).tolist()
        out = []
        for t, token in enumerate(ids):
            following = ids[t + 1] if t + 1 < len(ids) else None
            acts, indices = read.latents.acts[t], read.latents.indices[t]
            out.append(
                TokenTrace(
                    token=token_text(lm, token),
                    frozen=self._choices(frozen[t]),
                    decoder=self._choices(decoder[t]),
                    kl=kl[t],
                    actual=None
                    if following is None
                    else (float(frozen[t, following].exp()), float(decoder[t, following].exp())),
                    features=self._ranked(acts, indices, TOP_FEATURES) if t else [],
                    num_active=int((acts > 0).sum()),
                )
            )
        return out

    @torch.no_grad()
    def position(self, ids: tuple[int, ...], position: int) -> PositionDetail:
        """All active features of one position, each with the measured effect of its removal.

        Raises:
            BadInputError: there is no such position, or it is the attention sink.
        """
        self._check_position(ids, position)
        here = self._latents_at(ids, position)
        acts, indices = self._read(ids).latents
        so_far = SparseLatents(acts[: position + 1], indices[: position + 1])
        logits = self.session.decoder.logits(_alone(so_far))[0, -1]
        token = self._choices(logits.log_softmax(-1))[0]
        ranked = self._ranked(here.acts, here.indices, len(here.acts))
        effects = verify_on_decoder(
            self.session.decoder, so_far, token.token_id, [feature.latent for feature in ranked]
        )
        features = [ActiveFeature(*pair) for pair in zip(ranked, effects, strict=True)]
        return PositionDetail(features, token)

    @torch.no_grad()
    def intervene(
        self, ids: tuple[int, ...], position: int, latent: int, factor: float
    ) -> Intervention:
        """Scale one activation and run both models again.

        Args:
            factor: 0 takes the feature out, 1 changes nothing, 2 doubles it.

        Raises:
            BadInputError: no such position, or the feature is not active there.
        """
        self._check_position(ids, position)
        session, lm = self.session, self.session.lm
        read = self._read(ids)
        here = self._latents_at(ids, position)
        chosen = (here.indices == latent) & (here.acts > 0)
        if not bool(chosen.any()):
            raise BadInputError(
                f"Feature #{latent} is not active at token {position}.",
                "Only active features can be taken out or amplified.",
                "Choose one from the token's list.",
            )
        act = float(here.acts[chosen].sum())
        both = read.latents.acts.expand(2, -1, -1).clone()
        both[1, position] = torch.where(chosen, here.acts * factor, here.acts)
        edited = SparseLatents(both, read.latents.indices.expand(2, -1, -1))
        if not session.decoder.looks_back:  # it reads one position: no later prediction changes
            edited = SparseLatents(*(column[:, : position + 1] for column in edited))
        decoder = lm.unembed(session.decoder.hidden(edited)[:, position:])
        # Both rows take the same way, so that rounding cannot pass for an effect.
        resid = read.resid.expand(2, *read.resid.shape).clone()
        delta = (factor - 1) * act * session.sae.W_dec[latent]
        resid[1, position] = (resid[1, position].float() + delta).to(resid.dtype)
        final = lm.tail(resid, session.sae.spec.hook_layer)[:, position:]
        frozen = lm.unembed(final)
        return Intervention(latent, act, act * factor, self._change(decoder), self._change(frozen))

    def explain(self, ids: tuple[int, ...], position: int) -> Explanation:
        """Both methods' explanation of the prediction after one token.

        Raises:
            BadInputError: there is no such position, or it is the attention sink.
        """
        self._check_position(ids, position)
        prefix = torch.tensor(ids[: position + 1], device=self.session.lm.device)
        return self.session.explain_ids(prefix)

    @torch.no_grad()
    def row_effects(self, latent: int, count: int = 10) -> tuple[list[str], list[str]]:
        """Tokens whose logit a latent raises most through the decoder, and lowers most; raw text.

        Raises:
            BadInputError: the dictionary has no such latent.
        """
        session = self.session
        if not 0 <= latent < session.sae.num_latents:
            raise BadInputError(
                f"There is no latent {latent}.",
                f"The dictionary has latents 0 to {session.sae.num_latents - 1}.",
                "Choose one of those.",
            )
        row = session.decoder.direct(torch.tensor([latent], device=session.lm.device))[0]
        logits = session.lm.unembedding.float() @ row.float()
        ends = (logits.topk(count, largest=largest).indices.tolist() for largest in (True, False))
        up, down = ([token_text(session.lm, token) for token in tokens] for tokens in ends)
        return up, down

    def _change(self, logits: Tensor) -> Change:
        """From logits [2, n, V], before and after, the first position being the edited one."""
        before, after = logits.log_softmax(-1)
        best = [row[0].topk(TOP_TOKENS).indices.tolist() for row in (before, after)]
        shifts = [
            Shift(
                token_text(self.session.lm, token),
                token,
                float(before[0, token].exp()),
                float(after[0, token].exp()),
            )
            for token in dict.fromkeys(best[0] + best[1])
        ]
        first = best[0][0]
        kl = (before.exp() * (before - after)).sum(-1).clamp_min(0)
        return Change(shifts, float(before[0, first] - after[0, first]), kl.tolist())

    @torch.no_grad()
    def _read_anew(self, ids: tuple[int, ...]) -> _Reading:
        lm, sae = self.session.lm, self.session.sae
        batch = torch.tensor([ids], device=lm.device)
        resid, final = lm.resid_and_final(batch, sae.spec.hook_layer)
        latents = sae.encode(resid.float())
        return _Reading(resid[0], final[0], SparseLatents(latents.acts[0], latents.indices[0]))

    def _latents_at(self, ids: tuple[int, ...], position: int) -> SparseLatents:
        latents = self._read(ids).latents
        return SparseLatents(latents.acts[position], latents.indices[position])

    def _ranked(self, acts: Tensor, indices: Tensor, top: int) -> list[RankedFeature]:
        return rank_active(
            acts, indices, self.session.explainer.scales, self.session.labels, top=top
        )

    def _choices(self, logprobs: Tensor) -> list[Choice]:
        best = logprobs.topk(TOP_TOKENS)
        pairs = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        return [Choice(token_text(self.session.lm, token), token, p) for token, p in pairs]

    @staticmethod
    def _check_position(ids: Sequence[int], position: int) -> None:
        if not 1 <= position < len(ids):
            raise BadInputError(
                f"There are no features to look at for token {position}.",
                f"The prompt has tokens 0 to {len(ids) - 1}; token 0 is an attention sink, which "
                "no SAE was trained on.",
                "Choose another token.",
            )


def _alone(latents: SparseLatents) -> SparseLatents:
    """One text's latents [T, K] as a batch [1, T, K]."""
    return SparseLatents(latents.acts[None], latents.indices[None])

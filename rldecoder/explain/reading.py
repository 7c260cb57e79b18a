"""A prompt, read once: tokens, features, both models' predictions, and what a change does.

No intervention is estimated. It changes a latent's activation; the decoder is run again from the
changed latents, and the frozen model from the residual stream at the hook layer with
`(new - old) * W_dec[latent]` added. The SAE's error term stays in place, so that nothing but the
feature changes.

Axes: T position, K active latents, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import last_of_text
from rldecoder.errors import BadInputError
from rldecoder.explain.checking import TextStates, explain_last
from rldecoder.explain.compared import TOP_TOKENS, Comparison, compare, shifts
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.patching import decoder_effects
from rldecoder.explain.prompts import encode_prompt, token_text
from rldecoder.explain.ranking import RankedFeature, rank_active
from rldecoder.explain.read_records import (
    Change,
    Choice,
    Feature,
    FeatureTable,
    Intervention,
    TokenTrace,
)
from rldecoder.explain.steering import Changes
from rldecoder.explain.target import Target, find_target
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.sinks import SKIP_FIRST, is_sink
from rldecoder.sae.model import Sae
from rldecoder.sae.selection import SparseLatents

TOP_FEATURES = 5


@dataclass(frozen=True)
class PromptReader:
    """Loaded models, ready to read any number of prompts. Not for several threads at once."""

    lm: FrozenLM
    """In float32: an effect is a small difference, which a residual rounded to bfloat16 after its
    edit would lose."""
    sae: Sae
    decoder: SaeDecoderForCausalLM
    labels: Mapping[int, LabelText]
    explainer: Explainer

    def read(self, prompt: str) -> Reading:
        """Run the frozen model over the prompt, once.

        Raises:
            BadInputError: it is empty or longer than the model's context.
        """
        return Reading(self, encode_prompt(self.lm, prompt).tolist(), prompt)

    def explain(self, prompt: str) -> Explanation:
        """Explain the frozen model's next token after the prompt.

        Raises:
            BadInputError: it is empty or longer than the model's context.
        """
        return self.read(prompt).explain()

    @torch.no_grad()
    def row_effects(self, latent: int, count: int = 10) -> tuple[list[str], list[str]]:
        """Tokens whose logit a latent raises most through the decoder, and lowers most; raw text.

        Raises:
            BadInputError: the dictionary has no such latent.
        """
        Changes({latent: 1.0}).check(self.sae.num_latents)
        row = self.decoder.direct(torch.tensor([latent], device=self.lm.device))[0]
        logits = self.lm.unembedding.float() @ row.float()
        ends = (logits.topk(count, largest=largest).indices.tolist() for largest in (True, False))
        up, down = ([token_text(self.lm, token) for token in tokens] for tokens in ends)
        return up, down


class Reading:
    """One prompt as both models see it.

    Args:
        ids: T >= 2 tokens.
        prompt: what they say; None decodes them.
    """

    def __init__(self, reader: PromptReader, ids: Sequence[int], prompt: str | None = None) -> None:
        self.reader = reader
        self.ids = tuple(ids)
        self.prompt = self._decoded(self.ids) if prompt is None else prompt
        batch = torch.tensor([self.ids], device=reader.lm.device)
        with torch.no_grad():
            resid, final = reader.lm.resid_and_final(batch, reader.sae.spec.hook_layer)
            latents = reader.sae.encode(resid.float())
        tokens = tuple(token_text(reader.lm, token) for token in self.ids)
        self.states = TextStates(tokens, resid[0], final[0], latents.of(0))
        """What the one pass of the frozen model gave."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Each token's text, raw: escape it before showing."""
        return self.states.tokens

    @cached_property
    def predictions(self) -> tuple[TokenTrace, ...]:
        """Every position with both models' predictions, the last one included."""
        return tuple(self._trace())

    @property
    def kl(self) -> tuple[float, ...]:
        """KL(frozen || decoder) at every position, nats."""
        return tuple(trace.kl for trace in self.predictions)

    def target(self, token: str | int, minus: str | int | None = None) -> Target:
        """What effects are to be about: log p of a token, or the difference of two.

        Args:
            token: its text, with its spaces, or its number.
            minus: the same of a token whose log p is taken off.

        Raises:
            BadInputError: as in `find_target`.
        """
        return find_target(self.reader.lm, token, minus)

    def compare(self, other: Reading, at: int = -1, other_at: int = -1) -> Comparison:
        """Which features and which predictions differ from those of another prompt.

        Args:
            at, other_at: the position here, and in the other prompt.

        Raises:
            BadInputError: there is no such position, or it is the attention sink.
        """
        return compare(self, other, self.place(at), other.place(other_at))

    @torch.no_grad()
    def features(self, at: int = -1, target: Target | None = None) -> FeatureTable:
        """All active features of one position, each with the measured effect of its removal.

        Args:
            at: the position; negative ones count from the end.
            target: what the effects are about; None: log p of the decoder's most likely token.

        Raises:
            BadInputError: there is no such position, or it is the attention sink.
        """
        at = self.place(at)
        lm, decoder, text = self.reader.lm, self.reader.decoder, self.states.until(at + 1)
        logprobs = decoder.logits(text.latents.of(None))[0, -1].log_softmax(-1)
        about = Target(int(logprobs.argmax())) if target is None else target

        ranked = self.ranked(at)
        named = torch.tensor([[one.latent for one in ranked]], dtype=torch.long, device=lm.device)
        effects = self._effects(text.latents, about.token_id, named)
        if about.minus_id is not None:
            effects = effects - self._effects(text.latents, about.minus_id, named)
        rows = [
            Feature(
                one.latent, one.label, one.act, effect, one.normalised, one.confidence,
                one.unsure_label, one.description,
            )
            for one, effect in zip(ranked, effects.tolist(), strict=True)
        ]  # fmt: skip
        minus = None if about.minus_id is None else self._choice(logprobs, about.minus_id)
        return FeatureTable(rows, self._choice(logprobs, about.token_id), at, minus)

    def ablate(self, latent: int, at: int | None = None) -> Intervention:
        """Take a feature out at one position, or everywhere; see `intervene`."""
        return self.amplify(latent, 0.0, at)

    def amplify(self, latent: int, factor: float, at: int | None = None) -> Intervention:
        """Multiply a feature's activation at one position, or everywhere.

        Args:
            factor: 0 takes the feature out, 1 changes nothing, 2 doubles it.

        Raises:
            BadInputError: no such position, or the feature is not active there.
        """
        return self.intervene(Changes(scale={latent: factor}), at)

    def activate(self, latent: int, act: float, at: int | None = None) -> Intervention:
        """Set a latent's activation at one position, or everywhere, active or not.

        Args:
            act: in the SAE's units.

        Raises:
            BadInputError: no such position or latent.
        """
        return self.intervene(Changes(set={latent: act}), at)

    @torch.no_grad()
    def intervene(
        self,
        changes: Changes,
        at: int | None = None,
        *,
        start: int = 1,
        target: Target | None = None,
    ) -> Intervention:
        """Change activations and run both models again.

        Args:
            at: the position, which is then the one to look at; negative ones count from the end.
                None changes every position from `start` on and looks at the last.
            start: the first position that is changed where `at` is None; not the attention sink.
            target: what `effect` is about; None: log p of each model's most likely token.

        Raises:
            BadInputError: no such position or latent, or a feature that is to be scaled is not
                active there.
        """
        reader, lm = self.reader, self.reader.lm
        changes.check(reader.sae.num_latents)
        size = len(self.ids)
        first, seen = (self.place(start), size - 1) if at is None else (self.place(at),) * 2
        positions = torch.arange(size, device=lm.device)
        where = positions >= first if at is None else positions == first
        self._check_active(changes, where, at if at is None else first)
        changed = changes.apply(self.states.latents, where)

        # Both rows take the same way, so that rounding cannot pass for an effect.
        both = SparseLatents(
            torch.stack([changed.before.acts, changed.after.acts]),
            changed.after.indices.expand(2, -1, -1),
        )
        if not reader.decoder.looks_back:  # no prediction after the last change moves
            both = SparseLatents(*(column[:, : seen + 1] for column in both))
        decoder = lm.unembed(reader.decoder.hidden(both)[:, first:])
        resid = self.states.resid
        edited = (resid.float() + changed.added(reader.sae)).to(resid.dtype)
        final = lm.tail(torch.stack([resid, edited]), reader.sae.spec.hook_layer)[:, first:]

        totals = [
            float((column.acts * _named(column.indices, changes))[where].sum())
            for column in (changed.before, changed.after)
        ]
        return Intervention(
            seen, first, totals[0], totals[1],
            self._change(decoder, seen - first, target),
            self._change(lm.unembed(final), seen - first, target),
        )  # fmt: skip

    def explain(self, at: int = -1) -> Explanation:
        """Both methods' explanation of the prediction after one token.

        Args:
            at: the position; negative ones count from the end.

        Raises:
            BadInputError: there is no such position, or it is the attention sink.
        """
        end = self.place(at) + 1
        prompt = self.prompt if end == len(self.ids) else self._decoded(self.ids[:end])
        reader = self.reader
        return explain_last(
            reader.decoder, reader.explainer, reader.labels, self.states.until(end), prompt
        )

    def place(self, at: int) -> int:
        """A position as it is counted from the beginning.

        Raises:
            BadInputError: there is no such position, or it is the attention sink.
        """
        place = at + len(self.ids) if at < 0 else at
        if not 1 <= place < len(self.ids):
            raise BadInputError(
                f"There are no features to look at for token {at}.",
                f"The prompt has tokens 0 to {len(self.ids) - 1}; token 0 is an attention sink, "
                "which no SAE was trained on.",
                "Choose another token.",
            )
        return place

    def ranked(self, at: int, top: int | None = None) -> list[RankedFeature]:
        """The active features of a position, strongest first; all of them, or the first `top`."""
        acts, indices = self.states.latents.of(at)
        scales, labels = self.reader.explainer.scales, self.reader.labels
        return rank_active(acts, indices, scales, labels, top=len(acts) if top is None else top)

    @torch.no_grad()
    def _trace(self) -> list[TokenTrace]:
        lm, states = self.reader.lm, self.states
        frozen = lm.unembed(states.final).log_softmax(-1)
        decoder = self.reader.decoder.logits(states.latents.of(None))[0].log_softmax(-1)
        kl = (frozen.exp() * (frozen - decoder)).sum(-1).tolist()
        ids = torch.tensor(self.ids, device=frozen.device)
        sinks = is_sink(states.resid, ids, lm.front).tolist()

        out = []
        for t, token in enumerate(states.tokens):
            following = self.ids[t + 1] if t + 1 < len(self.ids) else None
            out.append(
                TokenTrace(
                    token=token,
                    frozen=self._choices(frozen[t]),
                    decoder=self._choices(decoder[t]),
                    kl=kl[t],
                    actual=None
                    if following is None
                    else (float(frozen[t, following].exp()), float(decoder[t, following].exp())),
                    features=self.ranked(t, TOP_FEATURES) if t else [],
                    num_active=int((states.latents.acts[t] > 0).sum()),
                    sink=t < SKIP_FIRST or sinks[t],
                )
            )
        return out

    def _check_active(self, changes: Changes, where: Tensor, at: int | None) -> None:
        acts, indices = (column[where] for column in self.states.latents)
        active = set(indices[acts > 0].tolist())
        for latent in changes.scale:
            if latent not in active:
                place = "in this prompt" if at is None else f"at token {at}"
                raise BadInputError(
                    f"Feature #{latent} is not active {place}.",
                    "Only active features can be taken out or amplified.",
                    "Choose one from the token's list, or set its activation.",
                )

    def _effects(self, latents: SparseLatents, token: int, named: Tensor) -> Tensor:
        """[n]: what taking each of `named` [1, n] out at the end costs log p(token), nats."""
        about = torch.tensor([token], device=named.device)
        return decoder_effects(self.reader.decoder, last_of_text(latents), about, named)[0]

    def _change(self, logits: Tensor, seen: int, target: Target | None) -> Change:
        """From logits [2, n, V], before and after, of which the position `seen` is looked at."""
        before, after = logits.log_softmax(-1)
        about = Target(int(before[seen].argmax())) if target is None else target
        wanted = [about.token_id, *([] if about.minus_id is None else [about.minus_id])]
        kl = (before.exp() * (before - after)).sum(-1).clamp_min(0)
        old, new = (about.of(row[seen]) for row in (before, after))
        return Change(
            shifts(self.reader.lm, before[seen], after[seen], wanted), float(old - new),
            kl.tolist(), (float(old), float(new)),
        )  # fmt: skip

    def _choices(self, logprobs: Tensor) -> list[Choice]:
        return [self._choice(logprobs, one) for one in logprobs.topk(TOP_TOKENS).indices.tolist()]

    def _choice(self, logprobs: Tensor, token: int) -> Choice:
        return Choice(token_text(self.reader.lm, token), token, float(logprobs[token].exp()))

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.reader.lm.tokenizer.decode(list(ids)))


def _named(indices: Tensor, changes: Changes) -> Tensor:
    """Whether each latent is one that the changes name."""
    named = torch.tensor(changes.latents, device=indices.device, dtype=torch.long)
    return torch.isin(indices, named)

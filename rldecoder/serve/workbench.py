"""What the server asks of prompts: readings of bounded length, the last ones kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from rldecoder.errors import BadInputError
from rldecoder.explain.prompts import token_text, tokenize_prompt
from rldecoder.explain.reading import PromptReader, Reading
from rldecoder.explain.steering import Changes, Steering, Which
from rldecoder.explain.target import Target, find_target
from rldecoder.serve.code import TargetNamed
from rldecoder.serve.requests import ChangeRequest, SteerRequest, TargetRequest

KEPT_PROMPTS = 4
"""Prompts whose residuals stay in memory, so that a click need not run the model again."""
KEPT_TEXTS = 16
"""Texts written without a change: they are the same whatever is changed beside them."""
MODELS: tuple[Which, ...] = ("frozen", "decoder")
Told = Callable[[Which, bool, str, int], None]
"""Told which model has written what, with changes or without, and how many tokens in all."""


class Workbench:
    """Loaded models and the prompts that the page asks about. Not for several threads at once.

    Args:
        max_tokens: longest prompt; the work and the memory grow with it.
    """

    def __init__(self, reader: PromptReader, *, max_tokens: int) -> None:
        self.reader = reader
        self.max_tokens = min(max_tokens, reader.lm.context_length)
        self._read = lru_cache(maxsize=KEPT_PROMPTS)(lambda ids: Reading(reader, ids))
        self._unchanged: dict[tuple[object, ...], str] = {}

    def read(self, prompt: str) -> Reading:
        """The prompt, read now or a moment ago.

        Raises:
            BadInputError: it is empty or too long.
        """
        ids = tokenize_prompt(self.reader.lm, prompt)
        if len(ids) > self.max_tokens:
            raise BadInputError(
                f"The prompt has {len(ids):,} tokens.",
                f"This server takes at most {self.max_tokens:,}.",
                "Shorten it, or start `rldecoder serve` with a larger --max-tokens.",
            )
        return self._read(tuple(ids.tolist()))

    def usual(self, latent: int) -> float:
        """A latent's usual high, as Method A measures by; 0 where it never fired."""
        return float(self.reader.explainer.scales[latent])

    def target(self, asked: TargetRequest | None) -> Target | None:
        """What effects are about.

        Raises:
            BadInputError: there is no such token, or it is a token less itself.
        """
        return None if asked is None else find_target(self.reader.lm, asked.token, asked.minus)

    def named(self, target: Target | None) -> TargetNamed | None:
        """The same with the tokens' texts, raw."""
        if target is None:
            return None
        minus = None if target.minus_id is None else token_text(self.reader.lm, target.minus_id)
        text = token_text(self.reader.lm, target.token_id)
        return TargetNamed(target.token_id, text, target.minus_id, minus)

    def write(self, asked: SteerRequest, told: Told) -> list[tuple[Which, bool, str]]:
        """What both models write, without changes and with them; raw text.

        Raises:
            BadInputError: the prompt, a latent or a value cannot be used.
        """
        # What cannot be used is refused before anything is written.
        self.read(asked.prompt)
        reader = self.reader
        plain, steered = (
            Steering(reader.lm, reader.sae, lambda: reader.decoder, changes, asked.start)
            for changes in (Changes(), changes_of(asked.changes))
        )
        key = (asked.prompt, asked.new_tokens, asked.temperature, asked.seed)
        written: list[tuple[Which, bool, str]] = []
        for number, (model, changed) in enumerate((m, c) for m in MODELS for c in (False, True)):
            if not changed and (model, *key) in self._unchanged:
                text = self._unchanged[model, *key]
            else:
                one = steered if changed else plain
                text = self._one(one, asked, model, changed, number, told)
                if not changed:
                    self._keep((model, *key), text)
            written.append((model, changed, text))
            told(model, changed, text, (number + 1) * asked.new_tokens)
        return written

    def _one(
        self,
        steering: Steering,
        asked: SteerRequest,
        model: Which,
        changed: bool,
        number: int,
        told: Told,
    ) -> str:
        step = number * asked.new_tokens

        def hear(text: str) -> None:
            nonlocal step
            step += 1
            told(model, changed, text, step)

        return steering.generate(
            asked.prompt,
            model=model,
            max_new_tokens=asked.new_tokens,
            temperature=asked.temperature,
            seed=asked.seed,
            on_text=hear,
        )

    def _keep(self, key: tuple[object, ...], text: str) -> None:
        while len(self._unchanged) >= KEPT_TEXTS:
            del self._unchanged[next(iter(self._unchanged))]
        self._unchanged[key] = text


def changes_of(asked: Sequence[ChangeRequest]) -> Changes:
    """What the library makes of a request; it refuses what cannot be meant."""
    clamps = {
        one.latent: (one.value, float("inf") if one.high is None else one.high)
        for one in asked
        if one.how == "clamp"
    }
    return Changes(
        {one.latent: one.value for one in asked if one.how == "scale"},
        {one.latent: one.value for one in asked if one.how == "set"},
        clamps,
    )

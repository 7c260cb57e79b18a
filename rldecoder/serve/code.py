"""What the page shows, as a few lines of Python with the library that give the same numbers.

Prompts and names stand in them as Python's own literals, in ASCII: a text cannot become code, and
what it hides shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rldecoder.explain.steering import Changes
from rldecoder.serve.requests import CompareRequest, SteerRequest

CONTEXTS = 8
"""Windows of text that a feature's page shows."""


class TargetNamed(NamedTuple):
    """A target with the texts of its tokens."""

    token_id: int
    token: str
    minus_id: int | None
    minus: str | None


class Code:
    """Writes programs.

    Args:
        opening: lines that define `run` (`Opened.python`).
    """

    def __init__(self, opening: Sequence[str]) -> None:
        self.opening = ("import rldecoder", *opening)

    def position(self, prompt: str, at: int, target: TargetNamed | None) -> str:
        """Predictions and features of one token."""
        return self._program(
            f"reading = run.read({_text(prompt)})",
            *_target(target),
            f"print(reading.predictions[{at}])",
            f"features = reading.features({at}{_given(target)})",
            "print(features)",
        )

    def intervention(
        self, prompt: str, changes: Changes, place: str, target: TargetNamed | None
    ) -> str:
        """A change at one token, or from one on.

        Args:
            place: `at=7` or `start=7`.
        """
        return self._program(
            "from rldecoder.explain.steering import Changes",
            f"reading = run.read({_text(prompt)})",
            *_target(target),
            f"changes = Changes({_changes(changes, 'scale=')})",
            f"found = reading.intervene(changes, {place}{_given(target)})",
            "print(found.frozen.target, found.decoder.target)",
            "print(found.frozen.shifts, found.decoder.shifts)",
        )

    def explanation(self, prompt: str, at: int) -> str:
        """Both methods' explanation."""
        return self._program(
            f"reading = run.read({_text(prompt)})",
            f"explanation = reading.explain({at})",
            "print(explanation.method_a)",
            "print(explanation.method_b)",
        )

    def steering(self, asked: SteerRequest, changes: Changes) -> str:
        """Both models writing, with the changes and without."""
        drawn = f", temperature={asked.temperature!r}, seed={asked.seed}"
        return self._program(
            f"prompt = {_text(asked.prompt)}",
            f"steering = run.steer({_changes(changes, '')}start={asked.start})",
            "texts = {",
            "    (model, changed): one.generate(",
            f"        prompt, model=model, max_new_tokens={asked.new_tokens}"
            f"{drawn if asked.temperature else ''})",
            '    for model in ("frozen", "decoder")',
            "    for changed, one in ((False, run.steer()), (True, steering))",
            "}",
            "print(texts)",
        )

    def comparison(self, asked: CompareRequest, at: tuple[int, int]) -> str:
        """Two prompts, each at one token."""
        return self._program(
            f"first = run.read({_text(asked.prompt)})",
            f"second = run.read({_text(asked.other)})",
            f"found = first.compare(second, {at[0]}, {at[1]})",
            "for one in found.features:",
            "    print(one.latent, one.activation, one.other_activation, one.difference)",
            "print(found.frozen.kl, found.decoder.kl)",
            "print(found.frozen.shifts, found.decoder.shifts)",
        )

    def feature(self, latent: int) -> str:
        """What is known of a latent."""
        return self._program(
            f"print(run.labels.get({latent}))",
            f"raised, lowered = run.reader().row_effects({latent})",
            "print(raised, lowered)",
            f"found = run.contexts({latent}, count={CONTEXTS})",
            "for one in found.contexts:",
            '    print(one.act, "".join(one.tokens))',
        )

    def _program(self, *lines: str) -> str:
        imports = [line for line in lines if line.startswith("from ")]
        rest = [line for line in lines if not line.startswith("from ")]
        first, *opening = self.opening
        more = [line for line in opening if line.startswith("from ")]
        head = [first, *more, *imports, ""]
        return "\n".join([*head, *(o for o in opening if o not in more), *rest, ""])


def _text(text: str) -> str:
    return ascii(text)


def _target(target: TargetNamed | None) -> list[str]:
    if target is None:
        return []
    if target.minus_id is None:
        return [f"target = reading.target({target.token_id})  # {_text(target.token)}"]
    return [
        f"target = reading.target({target.token_id}, {target.minus_id})"
        f"  # {_text(target.token)} less {_text(target.minus or '')}"
    ]


def _given(target: TargetNamed | None) -> str:
    return "" if target is None else ", target=target"


def _changes(changes: Changes, first: str) -> str:
    """Arguments; those of `run.steer` begin without a name and end in a comma."""
    clamps = {latent: _Band(band) for latent, band in changes.clamp.items()}
    parts = [f"{first}{dict(changes.scale)!r}"] if changes.scale else []
    parts += [f"set={dict(changes.set)!r}"] if changes.set else []
    parts += [f"clamp={clamps!r}"] if clamps else []
    return ", ".join(parts) + ("" if first or not parts else ", ")


class _Band(tuple[float, float]):
    """A clamp that prints as Python reads it: `inf` is no literal."""

    def __repr__(self) -> str:
        low, high = self
        return f"({low!r}, {f'float({str(high)!r})' if high == float('inf') else repr(high)})"

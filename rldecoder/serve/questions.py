"""The questions of the page: the models answer in turn, the catalogue at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Annotated, Any

import anyio
from fastapi import FastAPI, Query
from fastapi.responses import Response

from rldecoder.dashboard.cards import Context, ReviewShown
from rldecoder.dashboard.shown import ExampleShown
from rldecoder.explain.reading import Reading
from rldecoder.explain.steering import Which
from rldecoder.explain.target import find_token
from rldecoder.interp.contexts import FiringContext
from rldecoder.serve import answers, requests
from rldecoder.serve.code import CONTEXTS, TargetNamed
from rldecoder.serve.served import Served
from rldecoder.serve.turns import Answer, Lines, OneAtATime, Tell
from rldecoder.serve.workbench import changes_of
from rldecoder.visible_text import visible_token

QUEUE_SHOWN = 10


class Asked:
    """Answers of the models, one at a time."""

    def __init__(self, served: Served) -> None:
        self._bench, self._code, self._texts = served.workbench, served.code, served.texts

    def trace(self, asked: requests.PromptRequest) -> answers.TraceAnswer:
        """All tokens of a prompt."""
        return answers.TraceAnswer.model_validate(
            {"tokens": self._bench.read(asked.prompt).predictions}
        )

    def position(self, asked: requests.PositionRequest) -> answers.PositionAnswer:
        """All features of a token."""
        target = self._bench.target(asked.target)
        found = self._bench.read(asked.prompt).features(asked.position, target)
        code = self._code.position(asked.prompt, asked.position, self._bench.named(target))
        return answers.PositionAnswer.model_validate(
            {"token": found.token, "minus": found.minus, "features": list(found), "code": code}
        )

    def intervene(self, asked: requests.InterventionRequest) -> answers.InterventionAnswer:
        """What a change does."""
        target, changes = self._bench.target(asked.target), changes_of(asked.changes)
        reading, at = self._bench.read(asked.prompt), asked.position
        start = at if asked.where == "from" else 1
        if asked.where == "here":
            place, found = f"at={at}", reading.intervene(changes, at, target=target)
        else:
            place = f"start={start}"
            found = reading.intervene(changes, start=start, target=target)
        named = self._bench.named(target)
        code = self._code.intervention(asked.prompt, changes, place, named)
        values = found._asdict() | {"about": _about(named), "code": code}
        return answers.InterventionAnswer.model_validate(values)

    def explain(self, asked: requests.PositionRequest) -> answers.ExplainAnswer:
        """Both methods at a token."""
        shown = ExampleShown.of(self._bench.read(asked.prompt).explain(asked.position))
        code = self._code.explanation(asked.prompt, asked.position)
        return answers.ExplainAnswer.model_construct(**dict(shown), code=code)

    def compare(self, asked: requests.CompareRequest) -> answers.CompareAnswer:
        """Two prompts."""
        first, second = self._bench.read(asked.prompt), self._bench.read(asked.other)
        at = _or_last(first, asked.position), _or_last(second, asked.other_position)
        found = first.compare(second, *at)
        features = [
            answers.DifferenceShown(
                latent=one.latent, act=one.activation, other_act=one.other_activation,
                difference=one.difference, label=one.label, unsure_label=one.unsure_label,
                description=one.description, confidence=one.confidence,
            )
            for one in found.features
        ]  # fmt: skip
        values = {
            "tokens": first.tokens, "other_tokens": second.tokens, "at": found.at,
            "features": features, "frozen": found.frozen, "decoder": found.decoder,
            "code": self._code.comparison(asked, at),
        }  # fmt: skip
        return answers.CompareAnswer.model_validate(values)

    def token(self, asked: requests.TokenRequest) -> answers.NumberedChoice:
        """The token that a text is; its probability is not asked for."""
        lm = self._bench.reader.lm
        return answers.NumberedChoice(
            token=asked.text, token_id=find_token(lm, asked.text), probability=0
        )

    def steer(self, asked: requests.SteerRequest, tell: Tell) -> None:
        """Both models write, with the changes and without, line by line."""

        def told(model: Which, changed: bool, text: str, step: int) -> None:
            line = answers.WrittenLine(model=model, changed=changed, text=text, step=step)
            tell(line.model_dump(mode="json"))

        written = self._bench.write(asked, told)
        texts = [
            answers.WrittenLine(model=model, changed=changed, text=text, step=asked.new_tokens)
            for model, changed, text in written
        ]
        code = self._code.steering(asked, changes_of(asked.changes))
        tell(answers.SteerAnswer(texts=texts, code=code).model_dump(mode="json"))

    def row_effects(self, latent: int) -> tuple[list[str], list[str]]:
        """What a latent's row of the decoder raises and lowers."""
        return self._bench.reader.row_effects(latent)

    def contexts(self, latent: int) -> answers.ContextsAnswer:
        """Where a latent fires in unseen text."""
        found = self._texts(latent, CONTEXTS)
        return answers.ContextsAnswer(
            split=found.split,
            firings=found.firings,
            tokens=found.tokens,
            contexts=[_context(one) for one in found.contexts],
        )


def add_questions(app: FastAPI, served: Served, model: OneAtATime) -> None:
    """What the models answer."""
    asked = Asked(served)

    def in_turn(answer: Callable[..., Answer]) -> Callable[..., Awaitable[Answer]]:
        """The same, when its turn has come; FastAPI reads the signature of what is wrapped."""

        @wraps(answer)
        async def turn(**question: Any) -> Answer:
            return await model.run(lambda: answer(**question))

        return turn

    for answer in (
        asked.trace, asked.position, asked.intervene, asked.explain, asked.compare, asked.token
    ):  # fmt: skip
        app.post(f"/api/{answer.__name__}")(in_turn(answer))
    app.get("/api/features/{latent}/contexts")(in_turn(asked.contexts))

    @app.post("/api/steer")
    async def steer(request: requests.SteerRequest) -> Response:
        return Lines(model, lambda tell: asked.steer(request, tell))

    @app.get("/api/features/{latent}")
    async def feature(latent: int) -> answers.FeaturePage:
        effects = await model.run(lambda: asked.row_effects(latent))
        usual, code = served.workbench.usual(latent), served.code.feature(latent)
        page = served.catalogue.feature  # reads the file of verdicts
        return await anyio.to_thread.run_sync(page, latent, usual, effects, code)


def add_catalogue(app: FastAPI, served: Served) -> None:
    """What the catalogue answers, and verdicts."""
    catalogue = served.catalogue

    @app.get("/api/features")
    def features(query: Annotated[requests.FeatureQuery, Query()]) -> answers.SearchAnswer:
        return catalogue.search(query)

    @app.get("/api/find")
    def find(query: Annotated[requests.FindQuery, Query()]) -> answers.FindAnswer:
        return catalogue.find(query, served.workbench.usual)

    @app.get("/api/queue")
    def queue(count: Annotated[int, Query(ge=1, le=5000)] = QUEUE_SHOWN) -> answers.QueueAnswer:
        return catalogue.queue(count)

    @app.post("/api/reviews", status_code=201)
    def review(request: requests.ReviewRequest) -> ReviewShown:
        return catalogue.review(request)


def _about(target: TargetNamed | None) -> str:
    if target is None:
        return "log p of its first choice"
    name = f"log p of “{visible_token(target.token)}”"
    return name if target.minus is None else f"{name} less that of “{visible_token(target.minus)}”"


def _context(found: FiringContext) -> Context:
    strongest = max(*found.acts, 1e-9)
    heat = [round(act / strongest, 2) for act in found.acts]
    return Context(kind="unseen", tokens=found.tokens, heat=heat, act=found.act, focus=found.focus)


def _or_last(reading: Reading, position: int | None) -> int:
    return len(reading.ids) - 1 if position is None else position

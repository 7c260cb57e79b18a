"""Human review: the labels that matter most and are least certain, one form each.

The flow pauses at every label and shows a form in the UI (or waits for the API). Verdicts are
appended to a JSONL file as they come, so that nothing is lost when the reviewer stops half-way;
`label_features.reviews` reads that file, and the next run takes the verdicts into account: with
`rebuild` the flow makes that run itself.

A suspended flow run leaves its process, and starts anew from the top when it is resumed; so does a
paused one whose process ended with `make ui` (`flows.ghosts`). What it asked already is in the
names of its pauses, which the server keeps: the latent, and the artifacts that the form was made
of. The answers are there too. A review that was called from Python has no deployment that could
take it up again: see `flows.listening`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.input.actions import create_flow_run_input, read_flow_run_input
from prefect.input.run_input import keyset_from_base_key
from prefect.logging import get_run_logger
from pydantic import ConfigDict, Field, model_validator

from flows.listening import listening
from flows.outcome import NAME, plainly
from flows.parameters import PipelineParameters, RunParameters, or_empty
from flows.pipeline import run_from_parameters
from rldecoder.artifacts.catalogue import Clusters, Labels
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError
from rldecoder.interp.records import FeatureLabel, FeatureLabels
from rldecoder.interp.review import REVIEWS_FILE, ReviewLine, append_review, read_reviews, settled
from rldecoder.interp.review_queue import ReviewQueue
from rldecoder.interp.shown import shown
from rldecoder.runner import plan

POLL_SECONDS = 2


class ReviewParameters(RunParameters):
    """Whose labels, who looks at them, and how many."""

    reviewer: str = Field("", max_length=100)
    """Who answers; kept with every verdict. Empty: the first form asks for it, once."""
    count: int = Field(5, ge=1)
    """How many labels to look at, from the top of the queue."""
    timeout_seconds: int = Field(3600, ge=1)
    """How long the form of one label waits; the flow then fails and may be run again."""
    file: str | None = Field(None, max_length=1024, json_schema_extra=or_empty("a file"))
    """Where verdicts are appended; empty takes the run's `label_features.reviews`, or else
    `reviews.jsonl` in the store."""
    wait: Literal["suspend", "pause"] = "suspend"
    """`suspend`: no process waits; a worker takes the run up again after each answer, also after
    `make ui` was started anew. `pause`: a process waits for each answer, as one always does for
    a review that was called from Python."""
    rebuild: bool = False
    """After the last verdict run the pipeline until cluster_features with them, so that
    feature_labels.json and the queue hold them."""

    def named_files(self) -> dict[str, Path]:
        """The review file, where the form names one."""
        return {} if self.file is None else {"review file": Path(self.file)}


class _Form(RunInput):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Verdict(_Form):
    """The form of a label."""

    verdict: Literal["accept", "reject", "skip"]
    """Is the label right? `skip` keeps no verdict. Nothing is chosen for you."""
    better_label: str = ""
    """A better label, if you have one."""
    note: str = ""
    """Anything to remember."""

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_form(cls, values: Any) -> Any:
        # A form that was shown before an upgrade had a switch, and may be answered after it.
        if isinstance(values, dict) and isinstance(values.get("accept"), bool):
            rest = {key: value for key, value in values.items() if key != "accept"}
            return {"verdict": "accept" if values["accept"] else "reject", **rest}
        if isinstance(values, dict) and values.get("verdict") == "undecided":
            return {**values, "verdict": "skip"}
        return values


class MissingLabel(_Form):
    """The form of a latent without a label: there is nothing to accept."""

    better_label: str = ""
    """A label, if you have one."""
    note: str = ""
    """Anything to remember."""


class NamedVerdict(Verdict):
    """The first form of a review whose reviewer is not known yet."""

    reviewer: str = Field(min_length=1, max_length=100, pattern=r"\S")
    """Your name; it is kept with every verdict of this review, and asked for once."""


class NamedMissingLabel(MissingLabel):
    """The same, where there is no label."""

    reviewer: str = Field(min_length=1, max_length=100, pattern=r"\S")
    """Your name; it is kept with every verdict of this review, and asked for once."""


class LabelsToReview(NamedTuple):
    """The labels to review, and their order."""

    labels: FeatureLabels
    queue: ReviewQueue
    key: str
    """Names the artifacts."""


def as_markdown(feature: FeatureLabel) -> str:
    """One label with its evidence. All text of the corpus is shown as quoted JSON strings in
    code blocks: it is data, and may hold markup or invisible characters."""
    # What interfaces say of it comes first; a draft that they do not show is what is judged.
    said = shown(feature)
    draft = []
    if feature.failure is not None:
        draft = ["Why there is no label:", "", _code(feature.failure), ""]
    elif not said.is_label and feature.label is not None:
        draft = ["A draft that passed no test, to be judged:", "", _code(feature.label), ""]
    lines = [
        f"# Latent {feature.latent}",
        "",
        _ASKED if feature.label is not None else _ASKED_FOR_A_LABEL,
        "",
        f"{_KINDS[feature.kind]}:" if said.is_label else "What is known without a label:",
        "",
        _code(said.text),
        "",
        *draft,
        f"A test on unseen text gives it {feature.confidence:.0%} to be accepted; "
        f"{'sure enough to be quoted' if said.sure else 'not sure enough to be quoted'}. "
        f"It carries {feature.importance:.3g} nats of the predictions, the "
        f"{feature.importance_rank}. most of all, and fires on {feature.density:.2%} of tokens.",
        "",
        "Strongest examples (the token at which it fires comes second in each line):",
        "",
    ]

    for example in feature.examples:
        before = "".join(example.tokens[: example.focus])
        after = "".join(example.tokens[example.focus + 1 :])
        lines.append(_code(before, example.tokens[example.focus], after))
    promoted = [effect.token for effect in feature.promoted]
    lines += ["", "Raises most:", "", _code(*promoted), ""]
    return "\n".join(lines)


def _code(*texts: str) -> str:
    return "    " + "  ".join(json.dumps(text, ensure_ascii=True) for text in texts)


_RESUME = "Then press **Resume** (or Submit): the next label comes by itself."
_ASKED = f"**Is this label right?** Choose accept, reject or skip below. {_RESUME}"
_ASKED_FOR_A_LABEL = f"**There is no label.** Write one below if you can see it. {_RESUME}"
_KINDS = {
    "input": "The label says what the text is where it fires",
    "output": "The label says what it makes more likely",
    "both": "The label says what the text is where it fires, and what it makes more likely",
    "none": "A label that no test holds up",
}


@flow(name="review", flow_run_name=NAME, persist_result=False)
def review(parameters: ReviewParameters) -> int:
    """Show the top of the review queue and keep the verdicts; returns how many were asked for.

    Args:
        parameters: whose labels, who looks at them, and how many.
    """
    return plainly(lambda: ask(parameters))


def ask(parameters: ReviewParameters) -> int:
    """What the flows with a review share; call it inside a flow.

    Raises:
        BadInputError: the run has no labels yet.
    """
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    if flow_run is None or flow_run.deployment_id is not None:
        return _ask(parameters)
    with listening(flow_run.id):
        return _ask(parameters)


def _ask(parameters: ReviewParameters) -> int:
    run, store = parameters.load()
    path = Path(parameters.file or run.label_features.reviews or store.root / REVIEWS_FILE)
    keys = _pause_keys()
    published = _published(run, store, keys)
    labels = published.labels
    lines = read_reviews(path, labels.sae_digest, strict=False) if path.is_file() else []
    asked = {int(key.split("-")[1]) for key in keys}
    parameters = parameters.model_copy(
        update={"reviewer": parameters.reviewer.strip() or _name_given(keys)}
    )
    waiting = published.queue.waiting(labels, settled(lines, labels.features))
    # Answered before this run came back, and not in the file yet. The file cannot say: the same
    # person may have judged an older label of the latent, or this one in another run.
    open_ = [f for f in labels.features if f.latent in asked and not _is_done(f.latent)]
    new = [f for f in waiting if f.latent not in asked][: parameters.count - len(asked)]
    get_run_logger().info("%d labels to review; verdicts go to %s", len(open_) + len(new), path)
    for feature in (*open_, *new):
        line, name = _ask_one(feature, published, parameters)
        parameters = parameters.model_copy(update={"reviewer": name})
        if line is not None:
            append_review(path, line)
        _mark_done(feature.latent)
    if parameters.rebuild and path.is_file():
        _rebuild(parameters, path)
    return len(asked) + len(new)


def _pause_keys() -> list[str]:
    """Names of the forms that this flow run has shown before it was taken up again."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return []
    keys = context.flow_run.empirical_policy.pause_keys or ()
    return sorted(key for key in keys if key.startswith("latent-"))


def _name_given(keys: list[str]) -> str:
    """The name that the first form of this run was answered with; empty where none was."""
    for key in keys:
        said = _response(key)
        if isinstance(said, dict) and str(said.get("reviewer", "")).strip():
            return str(said["reviewer"]).strip()
    return ""


def _response(key: str) -> Any:
    """What a form was answered; None where nothing was. Prefect files it by how the run waited."""
    for state in ("paused", "suspended"):
        said = read_flow_run_input(keyset_from_base_key(f"{state}-{key}")["response"])
        if said is not None:
            return said
    return None


def _is_done(latent: int) -> bool:
    """Whether this flow run has kept what was said of a latent."""
    return read_flow_run_input(f"done-{latent}") is not None


def _mark_done(latent: int) -> None:
    """Remember it with the flow run: one that was suspended is given all of its answers again."""
    if not _is_done(latent):
        create_flow_run_input(f"done-{latent}", True)


def is_resumed() -> bool:
    """Whether this flow run asked something before, and was suspended or tried again."""
    return bool(_pause_keys())


def _published(run: RunConfig, store: ArtifactStore, keys: list[str]) -> LabelsToReview:
    """Labels and queue: those that this flow run began with, else those of the config now."""
    refs = plan(run)
    found = [refs[name] for name in ("label_features", "cluster_features")]
    if keys:
        # Verdicts in the file may be a part of the config, and then change what it asks for.
        began = keys[0].split("-")[2:4]
        found = [ref.model_copy(update={"digest": d}) for ref, d in zip(found, began, strict=True)]
    for ref in found:
        if not store.is_published(ref):
            raise BadInputError(
                f"The run {run.name} has no labels to review yet.",
                f"{ref} is not in {store.place}.",
                "Run the pipeline until cluster_features first (again, after new verdicts).",
            )
        store.verify(ref)
    return _load(store, *found)


def _load(store: ArtifactStore, first: ArtifactRef, second: ArtifactRef) -> LabelsToReview:
    labels = FeatureLabels.load(Labels.labels.path(store.path(first)))
    queue = ReviewQueue.load_for(labels, Clusters.queue.path(store.path(second)))
    return LabelsToReview(labels, queue, f"{first.digest}-{second.digest}")


def _ask_one(
    feature: FeatureLabel, published: LabelsToReview, parameters: ReviewParameters
) -> tuple[ReviewLine | None, str]:
    """Show one form and wait: what to keep, None if the answer says nothing; and who answered."""
    form: type[_Form] = MissingLabel if feature.label is None else Verdict
    if not parameters.reviewer:
        form = NamedMissingLabel if feature.label is None else NamedVerdict
    answer: Any = _said_before(feature.latent, form)
    if answer is None:
        text = as_markdown(feature)
        create_markdown_artifact(text, key="review", description=f"Latent {feature.latent}")
        answer = _wait(
            form.with_initial_data(description=text),
            f"latent-{feature.latent}-{published.key}",
            parameters,
        )

    reviewer = parameters.reviewer or answer.reviewer.strip()
    better = answer.better_label.strip() or None
    accept = None
    if feature.label is not None and answer.verdict != "skip":
        accept = answer.verdict == "accept"
    note = answer.note.strip()
    if accept is None and better is None and not note:
        return None, reviewer  # skipped, or an untouched form: it says nothing

    line = ReviewLine(
        sae_digest=published.labels.sae_digest, latent=feature.latent, reviewer=reviewer,
        accept=accept, label=better, audit=feature.audit, note=note, shown=feature.label,
    )  # fmt: skip
    return line, reviewer


def _said_before(latent: int, form: type[_Form]) -> _Form | None:
    """What was answered to a form of this run whose process ended before it heard of it."""
    for key in reversed(_pause_keys()):
        if int(key.split("-")[1]) == latent:
            said = _response(key)
            if said is not None:
                # The first form asked for a name, too, which is known by now.
                named = form.model_fields.keys() | {"accept"}
                return form.model_validate({k: v for k, v in said.items() if k in named})
    return None


def _wait(form: Any, key: str, parameters: ReviewParameters) -> Any:
    """The answer. A suspended run comes back with the same key, and is given what was said."""
    context = FlowRunContext.get()
    flow_run = None if context is None else context.flow_run
    has_deployment = flow_run is not None and flow_run.deployment_id is not None
    if parameters.wait == "suspend" and has_deployment:  # only a worker can take it up again
        return suspend_flow_run(wait_for_input=form, timeout=parameters.timeout_seconds, key=key)
    return pause_flow_run(
        wait_for_input=form,
        timeout=parameters.timeout_seconds,
        poll_interval=POLL_SECONDS,
        # A new key each time: Prefect lets a key pause only once, also after a timeout.
        key=f"{key}-{uuid4().hex}",
    )


def _rebuild(parameters: ReviewParameters, path: Path) -> None:
    """The pipeline with the verdicts, until the queue that knows them."""
    run_from_parameters(
        PipelineParameters(
            config=parameters.config,
            overrides=[
                *parameters.overrides,
                f"label_features.reviews={json.dumps(str(path.resolve()))}",
            ],
            store=parameters.store,
            until="cluster_features",
        )
    )

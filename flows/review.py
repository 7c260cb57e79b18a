"""Human review: the labels that matter most and are least certain, one form each.

The flow pauses at every label and shows a form in the UI (or waits for the API). Verdicts are
appended to a JSONL file as they come, so that nothing is lost when the reviewer stops half-way;
`label_features.reviews` reads that file, and the next run takes the verdicts into account.
"""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from pydantic import ConfigDict, Field

from flows.parameters import RunParameters
from rldecoder.errors import BadInputError
from rldecoder.interp.records import FeatureLabel, FeatureLabels
from rldecoder.interp.review import (
    REVIEWS_FILE,
    ReviewLine,
    append_review,
    read_reviews,
)
from rldecoder.interp.review_queue import ReviewQueue
from rldecoder.runner import plan

POLL_SECONDS = 2


class ReviewParameters(RunParameters):
    """Whose labels, who looks at them, and how many."""

    reviewer: str = Field("anonymous", min_length=1)
    """Who answers; kept with every verdict."""
    count: int = Field(5, ge=1)
    """How many labels to look at, from the top of the queue."""
    timeout_seconds: int = Field(3600, ge=1)
    """How long the form of one label waits; the flow then fails and may be run again."""
    file: str | None = None
    """Where verdicts are appended; empty takes the run's `label_features.reviews`, or else
    `reviews.jsonl` in the store."""


class Verdict(RunInput):
    """The form."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    accept: bool
    """Is the label right?"""
    better_label: str = ""
    """A better label, if you have one."""
    note: str = ""
    """Anything to remember."""


def as_markdown(feature: FeatureLabel) -> str:
    """One label with its evidence. All text of the corpus is shown as quoted JSON strings in
    code blocks: it is data, and may hold markup or invisible characters."""
    shown = feature.label if feature.label is not None else f"(none: {feature.failure})"
    lines = [
        f"# Latent {feature.latent}",
        "",
        _code(shown),
        "",
        f"Confidence {feature.confidence:.2f}, importance {feature.importance:.3g} nats "
        f"(rank {feature.importance_rank}), fires on {feature.density:.2%} of tokens.",
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


@flow(name="review", persist_result=False)
def review(parameters: ReviewParameters) -> int:
    """Show the top of the review queue and keep the verdicts; returns how many were given.

    Args:
        parameters: whose labels, who looks at them, and how many.
    """
    run, store = parameters.load()
    refs = plan(run)
    for name in ("label_features", "cluster_features"):
        if not store.is_published(refs[name]):
            raise BadInputError(
                f"The run {run.name} has no labels to review yet.",
                f"{refs[name]} is not in {store.root}.",
                "Run the pipeline until cluster_features first (again, after new verdicts).",
            )
        store.verify(refs[name])
    labels = FeatureLabels.load(store.path(refs["label_features"]))
    queue = ReviewQueue.load(store.path(refs["cluster_features"]), labels)
    path = Path(parameters.file or run.label_features.reviews or store.root / REVIEWS_FILE)
    seen = {r.latent for r in read_reviews(path, labels.sae_digest)} if path.is_file() else set()
    waiting = queue.waiting(labels, seen)[: parameters.count]
    get_run_logger().info("%d labels to review; verdicts go to %s", len(waiting), path)
    for feature in waiting:
        text = as_markdown(feature)
        create_markdown_artifact(text, key="review", description=f"Latent {feature.latent}")
        verdict = pause_flow_run(
            wait_for_input=Verdict.with_initial_data(description=text),
            timeout=parameters.timeout_seconds,
            poll_interval=POLL_SECONDS,
            # A new key each time: Prefect lets a key pause only once, also after a timeout.
            key=f"latent-{feature.latent}-{uuid4().hex}",
        )
        append_review(
            path,
            ReviewLine(
                sae_digest=labels.sae_digest,
                latent=feature.latent,
                reviewer=parameters.reviewer,
                accept=verdict.accept,
                label=verdict.better_label.strip() or None,
                audit=feature.audit,
                note=verdict.note,
            ),
        )
    return len(waiting)

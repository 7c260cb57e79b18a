"""The command `estimate-labels`: what labels by a language model would cost, without asking it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError

STAGE = "label_features"


def show_estimate(run: RunConfig, store: ArtifactStore, console: Console) -> None:
    """Print requests, tokens and cost that are still to come, and what was spent.

    Raises:
        BadInputError: the run has not come so far, or names no language model.
    """
    if run.label_features.llm is None:
        raise BadInputError(
            "There is nothing to estimate.",
            "`label_features.labelers` names no language model.",
            "Add `llm` to it, and a section `label_features.llm`: see docs/labels.md.",
        )
    from rldecoder.runner import open_inputs, plan
    from rldecoder.stages.table import stage_named

    refs = plan(run)
    stage = stage_named(STAGE)
    missing = [name for name in stage.upstream if not store.is_published(refs[name])]
    if missing:
        raise BadInputError(
            f"The run {run.name} has not come as far as {STAGE}.",
            f"Missing in {store.root}: {', '.join(missing)}.",
            f"Run `rldecoder run CONFIG --until {stage.upstream[-1]}`, with the same --store and "
            "--set.",
        )
    inputs = open_inputs(stage, refs, store)
    import torch  # here, because what comes before should be quick

    from rldecoder.cli.progress import RichReporter
    from rldecoder.seeds import derive_seed
    from rldecoder.stages.context import StageContext
    from rldecoder.stages.label_features import estimate

    with tempfile.TemporaryDirectory() as scratch:
        # An interrupted run's own folder, for its ledger; never made here: it would look like one.
        progress = store.progress_path(refs[STAGE])
        ctx = StageContext(
            Path(scratch),
            progress if progress.is_dir() else Path(scratch),
            derive_seed(run.seed, STAGE),  # the runner's: prompts, and so the cache, must agree
            torch.device("cpu"),
            RichReporter(),
        )
        still, spent = estimate(inputs, run.label_features, ctx)
    table = Table(title=f"{escape(run.name)}: labels by a language model", title_justify="left")
    for column in ("", "expected", "at most"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("requests still to send", f"{still.requests:,}", f"{2 * still.requests:,}")
    table.add_row("answers in the cache", f"{still.cached:,}", "")
    table.add_row("prompt tokens", f"{still.tokens_in:,}", "")
    table.add_row("answer tokens", f"{still.tokens_out:,}", "")
    table.add_row("tokens", f"{still.tokens:,}", f"{still.most_tokens:,}")
    table.add_row("US dollars", f"{still.cost:,.4f}", f"{still.most_cost:,.4f}")
    console.print(table)
    console.print(
        "At most: every answer needs a second request. Attempts that fail and are repeated "
        "come on top; the budget counts them.",
        highlight=False,
    )
    if spent.requests:
        console.print(
            f"Spent by the interrupted run: {spent.requests:,} requests, {spent.tokens:,} tokens, "
            f"{spent.cost:,.4f} US dollars.",
            highlight=False,
        )

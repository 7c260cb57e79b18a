"""The command `estimate-labels`: what labels by a language model would cost, without asking it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rldecoder.errors import BadInputError

if TYPE_CHECKING:
    from rldecoder.run import Run


def show_estimate(run: Run, console: Console) -> None:
    """Print requests, tokens and cost that are still to come, and what was spent.

    Raises:
        BadInputError: the run has not come so far, or names no language model.
    """
    if run.config.label_features.llm is None:
        raise BadInputError(
            "There is nothing to estimate.",
            "`label_features.labelers` names no language model.",
            "Add `llm` to it, and a section `label_features.llm`: see docs/labels.md.",
        )
    from rldecoder.artifacts.catalogue import Labels
    from rldecoder.stages.inputs import LabelInputs

    inputs = run.inputs(LabelInputs, "to estimate labels")

    import torch  # here, because what comes before should be quick

    from rldecoder.cli.progress import RichReporter
    from rldecoder.seeds import derive_seed
    from rldecoder.stages.context import StageContext
    from rldecoder.stages.label_features import estimate

    with tempfile.TemporaryDirectory() as scratch:
        # An interrupted run's own folder, for its ledger; never made here: it would look like one.
        progress = run.store.progress_path(run.refs[Labels.stage])
        ctx = StageContext(
            Path(scratch),
            progress if progress.is_dir() else Path(scratch),
            # The runner's seed: prompts, and so the cache, must agree.
            derive_seed(run.config.seed, Labels.stage),
            torch.device("cpu"),
            RichReporter(),
        )
        still, spent = estimate(inputs, run.config.label_features, ctx)

    table = Table(
        title=f"{escape(run.config.name)}: labels by a language model", title_justify="left"
    )
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
        "come on top; the budget counts them."
    )
    if spent.requests:
        console.print(
            f"Spent by the interrupted run: {spent.requests:,} requests, {spent.tokens:,} tokens, "
            f"{spent.cost:,.4f} US dollars."
        )

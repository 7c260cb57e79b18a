"""What labels by a language model would cost, as it is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rldecoder import open_run
from rldecoder.cli.estimate import show_estimate
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError
from rldecoder.interp.llm.estimate import Estimate
from rldecoder.interp.llm.storage import Spent
from rldecoder.seeds import derive_seed
from rldecoder.stages.context import StageContext
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "debug.yaml"
WITH_LLM = ["label_features.labelers=[predicate, llm]", "label_features.llm={}"]


def test_without_a_language_model_there_is_nothing_to_estimate(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="nothing to estimate"):
        show_estimate(open_run(CONFIG, tmp_path), Console())


@pytest.mark.parametrize("spent", [Spent(0, 0, 0.0), Spent(3, 4000, 0.5)])
def test_requests_tokens_and_cost_are_shown(
    debug_store: Path, monkeypatch: pytest.MonkeyPatch, spent: Spent
) -> None:
    seen: list[StageContext] = []

    def estimate(inputs: Any, config: Any, ctx: StageContext) -> tuple[Estimate, Spent]:
        seen.append(ctx)
        return Estimate(1200, 7, 50_000, 6000, 1.25, 90_000, 2.5), spent

    monkeypatch.setattr("rldecoder.stages.label_features.estimate", estimate)
    console = Console(record=True, width=200)
    config = load_run_config(CONFIG, WITH_LLM)
    show_estimate(open_run(config, debug_store), console)
    text = console.export_text()
    for number in ("1,200", "2,400", "56,000", "90,000", "1.2500", "2.5000"):
        assert number in text
    assert ("Spent by the interrupted run: 3 requests" in text) == bool(spent.requests)
    # The runner's seed, for prompts and so the cache depend on it; and no folder is left behind.
    assert seen[0].seed == derive_seed(config.seed, "label_features")
    assert not seen[0].out.exists()

"""The SAE benchmark runs, tiny; its numbers are for docs/results.md and are not judged here."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from benchmarks.bench_sae import app

SIZES = ["--d-model", "16", "--num-latents", "64", "--k", "4", "--only", "rldecoder float32",
         "--threads", "1"]  # fmt: skip  # the number of threads outlives the call


def test_speed_shows_a_step_beside_the_machines_rate() -> None:
    shown = CliRunner().invoke(app, ["speed", *SIZES, "--batch-tokens", "64", "--steps", "1"])
    assert shown.exit_code == 0, shown.output
    row = next(line for line in shown.output.splitlines() if line.startswith("│ rldecoder"))
    _, _, milliseconds, fastest, tokens, *_ = (cell.strip() for cell in row.split("│"))
    assert 0 < float(fastest) <= float(milliseconds)
    assert float(tokens.replace(",", "")) > 0
    rate = re.search(r"peak: .* ([\d,]+) GFLOP/s", shown.output)
    assert rate is not None
    assert float(rate[1].replace(",", "")) > 0


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_quality_takes_the_rate_that_is_best_on_validation_data(architecture: str) -> None:
    shown = CliRunner().invoke(
        app,
        ["quality", *SIZES, "--directions", "48", "--active", "2", "--tokens", "10240",
         "--rates", "1e-6,1e-2", "--architecture", architecture],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    tried = [line.split() for line in shown.output.splitlines() if line.startswith("rldecoder")]
    fvu = {line[3]: float(line[4]) for line in tried}
    assert fvu["0.01"] < fvu["1e-06"]
    table = next(line for line in shown.output.splitlines() if line.startswith("│ rldecoder"))
    assert [cell.strip() for cell in table.split("│")][3] == "0.01"

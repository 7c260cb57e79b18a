"""How many seconds each stage takes here: FLOPs at the measured rate, slowed as stages are.

A stage is slower than one large forward pass (small products, single tokens, sorting), and it
loads models, reads files and draws figures, whatever its budgets. Both were taken from recorded
runs of the quickstart and of a text of one's own on one machine; another one tests them
(tests/planning/test_durations.py). What is said is for a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rldecoder.config.run import RunConfig
from rldecoder.lm.smoke import SEQUENCE_TOKENS, SmokeResult
from rldecoder.lm.specs import ArchitectureConstants
from rldecoder.planning.costs import stage_cost
from rldecoder.planning.sizes import sizes_of
from rldecoder.planning.sizing import Sizing
from rldecoder.stages.table import STAGES

REFERENCE_RATE = 734e9
"""FLOPs a second of the machine of the table, 2 cores of a Xeon with AMX, in bfloat16."""

LARGE_PRODUCTS = frozenset({"cache_activations"})
"""Stages that do nothing but large forward passes, as the measured rate does."""
CLOSENESS = 0.37
"""Power of the measured rates' ratio by which slower machines are slower in the other stages. An
AVX2 machine of a fifth of the rate took 1.4 to 2.8 times as long for them: they compute in float32,
which two machines do more alike than bfloat16."""
SLOWEST = 2.5
"""Times that what does not compute is slower on the slowest machine that was seen (2.4)."""


class Pace(NamedTuple):
    """How a stage's time follows from its FLOPs."""

    slowdown: float
    """Times slower than one large forward pass."""
    fixed_seconds: float
    """Whatever its budgets, on the machine of the table."""


PACES = {
    "sync_tokenizer": Pace(1.0, 12), "ingest": Pace(1.0, 4), "baselines": Pace(2.2, 7),
    "sweep_sae": Pace(4.0, 0.1), "frontier": Pace(2.7, 0.1), "cache_activations": Pace(1.0, 1),
    "train_sae": Pace(4.0, 4), "gate_sae": Pace(2.5, 7), "train_decoder": Pace(2.7, 4),
    "gate_decoder": Pace(2.0, 6), "train_ppo": Pace(1.0, 12), "control_ppo": Pace(0.6, 30),
    "freeze_decoder": Pace(1.0, 0.2), "rank_features": Pace(1.1, 2),
    "label_features": Pace(4.0, 6), "cluster_features": Pace(6.0, 2),
    "train_explainer": Pace(7.3, 20), "evaluate": Pace(2.1, 5), "report": Pace(1.0, 4),
}  # fmt: skip


def rate_of(smoke: SmokeResult) -> float:
    """FLOPs a second of a machine, by a smoke test."""
    return sizes_of(smoke.constants).forward_flops(SEQUENCE_TOKENS) * smoke.tokens_per_second


def expected_seconds(
    run: RunConfig, constants: ArchitectureConstants, flops_per_second: float
) -> dict[str, float]:
    """Seconds of every stage, in the order of the pipeline.

    Args:
        flops_per_second: of one large forward pass, as `rate_of` gives it.
    """
    sizing = Sizing(run, sizes_of(constants))
    # A tiny model's rate is low on any machine, so it says little about this one.
    slower = max(1.0, REFERENCE_RATE / flops_per_second) ** CLOSENESS
    others = max(flops_per_second, REFERENCE_RATE) / slower
    seconds = {}
    for stage in STAGES:
        pace = PACES[stage.name]
        rate = flops_per_second if stage.name in LARGE_PRODUCTS else others
        computing = stage_cost(stage.name, sizing).flops / rate
        seconds[stage.name] = pace.slowdown * computing + min(slower, SLOWEST) * pace.fixed_seconds
    return seconds


def seconds_left(expected: Mapping[str, float], took: Mapping[str, float], share: float) -> float:
    """What is left of a run, corrected by how long its parts took so far.

    Args:
        expected: seconds of the stages that are to be built, the present one among them.
        took: seconds of those that are done, and of the present one so far.
        share: of the present stage that is done, 0 to 1.
    """
    done = sum(expected[name] for name in took)
    last = [*took][-1] if took else None
    if last is not None:
        done -= (1 - share) * expected[last]
    left = sum(expected.values()) - done
    # Early on, the estimate counts; later what was measured. A minute's worth weighs as much.
    pace = (sum(took.values()) + 60) / (done + 60)
    # A stage that tells no share may be nearly done, or slower than ever: it is given some time.
    late = took[last] - expected[last] * pace if last is not None and share == 0 else 0.0
    return max(0.0, left * pace, 0.0 if share else late / 4)

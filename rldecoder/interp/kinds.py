"""Which of a latent's two labels pass, and how many latents are covered, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rldecoder.evals.statistics import Measured, proportion, two_sample_bootstrap
from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.labelling import Labelled
from rldecoder.interp.output_labels import OutputLabelled
from rldecoder.interp.records import Kind, OutputScores
from rldecoder.interp.scores import LabelScores
from rldecoder.json_records import Row
from rldecoder.schemas import JsonRecord, Scalar, table_schema

BoolArray = NDArray[np.bool_]
OUTPUT_SCORES = pa.schema(
    [
        ("latent", pa.int32()),
        ("method", pa.string()),
        ("labelled", pa.bool_()),
        ("accepted", pa.bool_()),
        *table_schema(OutputScores, places=pa.int64(), documents=pa.int64()),
    ]
)
"""One row a latent and method ("label", "shuffled", "random_sae", "drawn"): output labels."""


class BothKinds(NamedTuple):
    """Labels of some latents of one SAE, of both kinds; rows as in the firings."""

    latents: NDArray[np.int64]
    inputs: Labelled
    """Of strong firings."""
    weak: list[LabelScores]
    """The same labels against all firings."""
    outputs: OutputLabelled


class Accepted(NamedTuple):
    """Which labels pass on the `test` split; [K] each."""

    inputs: BoolArray
    outputs: BoolArray

    @property
    def either(self) -> BoolArray:
        """Latents with a label that passes."""
        return self.inputs | self.outputs

    def kinds(self) -> list[Kind]:
        """The kind of each latent."""
        names: dict[tuple[bool, bool], Kind] = {
            (True, True): "both", (True, False): "input", (False, True): "output",
            (False, False): "none",
        }  # fmt: skip
        pairs = zip(self.inputs.tolist(), self.outputs.tolist(), strict=True)
        return [names[pair] for pair in pairs]


def passing(found: BothKinds, bars: Acceptance, shuffled: Labelled | None = None) -> Accepted:
    """Which labels pass; a failure never does.

    Args:
        shuffled: input labels of the shuffled control, which leaves failures out; then which
            latents would pass with another latent's labels.
    """
    inputs, scores = found.inputs, found.outputs.scores
    if shuffled is not None:
        inputs, scores = shuffled, found.outputs.shuffled
    passed = {
        draft.latent
        for draft, got in zip(*inputs, strict=True)
        if draft.text is not None and bars.accepts(got)
    }
    sets = zip(found.outputs.sets, scores, strict=True)
    return Accepted(
        np.array([latent in passed for latent in found.latents.tolist()], bool),
        np.array([not held.failure and bars.accepts_output(got) for held, got in sets], bool),
    )


class KindCoverage(JsonRecord):
    """How many of some latents have a label that passes on the `test` split; failures count."""

    latents: int
    input: int
    """Latents with an input label alone that passes."""
    output: int
    both: int
    none: int
    coverage: Measured
    """Share of latents with either; Wilson interval."""
    input_coverage: Measured
    """With an input label that passes, alone or not."""
    output_coverage: Measured

    @classmethod
    def of(cls, found: Accepted) -> KindCoverage:
        """Count."""
        kinds = found.kinds()
        return cls(
            latents=len(kinds), input=kinds.count("input"), output=kinds.count("output"),
            both=kinds.count("both"), none=kinds.count("none"), coverage=_share(found.either),
            input_coverage=_share(found.inputs), output_coverage=_share(found.outputs),
        )  # fmt: skip


class CoverageGap(JsonRecord):
    """Coverage of labels less that of a control, with its 95 % interval (bootstrap)."""

    difference: float
    low: float
    high: float


class Coverages(JsonRecord):
    """Coverage of labels and controls, by one procedure."""

    methods: dict[str, KindCoverage]
    """`label`, `shuffled` (each latent with another's label, of both kinds), `random_sae`,
    `drawn`."""
    gaps: dict[str, CoverageGap]
    """`label_shuffled`, `label_random_sae`, `drawn_random_sae` (like for like)."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        out: dict[str, Scalar] = {}
        for method, found in self.methods.items():
            out[f"coverage_{method}"] = found.coverage.value
            out[f"coverage_{method}_output"] = found.output_coverage.value
        for name, gap in self.gaps.items():
            out[f"coverage_gap_{name}"] = gap.difference
            out[f"coverage_gap_{name}_low"] = gap.low
            out[f"coverage_gap_{name}_high"] = gap.high
        return out


def coverages(methods: Mapping[str, Accepted]) -> Coverages:
    """Coverage by method, and the gaps between them."""
    gaps = {}
    for first, second in (("label", "shuffled"), ("label", "random_sae"), ("drawn", "random_sae")):
        sides = [methods[name].either.astype(np.float64) for name in (first, second)]
        if all(side.size for side in sides):
            difference, low, high = two_sample_bootstrap(*sides)
            gaps[f"{first}_{second}"] = CoverageGap(difference=difference, low=low, high=high)
    return Coverages(
        methods={name: KindCoverage.of(found) for name, found in methods.items()}, gaps=gaps
    )


def output_rows(methods: Mapping[str, BothKinds], passed: Mapping[str, Accepted]) -> list[Row]:
    """Rows of OUTPUT_SCORES; the shuffled ones are of the latents of `label`."""
    rows = []
    for name, of_name in passed.items():
        found = methods["label" if name == "shuffled" else name]
        outputs = found.outputs
        scores = outputs.shuffled if name == "shuffled" else outputs.scores
        for row, latent in enumerate(found.latents.tolist()):
            about = {"latent": latent, "method": name, "labelled": not outputs.sets[row].failure}
            about["accepted"] = bool(of_name.outputs[row])
            rows.append(about | scores[row].model_dump())
    return rows


def _share(passed: BoolArray) -> Measured:
    return proportion(int(passed.sum()), passed.size)

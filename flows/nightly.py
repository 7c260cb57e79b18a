"""The nightly run: the whole pipeline again, and a page that says what had to be built.

On an unchanged checkout every stage is verified, byte by byte, and reused; a changed corpus,
config or stage version shows as stages that were built.
"""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.outcome import NAME, plainly
from flows.parameters import PipelineParameters
from flows.pipeline import run_from_parameters
from rldecoder.runner import StageRun


@flow(name="nightly", flow_run_name=NAME, persist_result=False)
def nightly(parameters: PipelineParameters) -> list[StageRun]:
    """Run the pipeline and list, stage by stage, what was reused and what was built."""
    return plainly(lambda: _run_and_list(parameters))


def _run_and_list(parameters: PipelineParameters) -> list[StageRun]:
    results = run_from_parameters(parameters)
    create_table_artifact(
        [
            {
                "stage": result.ref.stage,
                "artifact": result.ref.digest,
                "what": _what(result),
                "verdict": result.verdict or "",
                "seconds": round(result.wall_seconds, 1),
            }
            for result in results
        ],
        key="nightly",
        description=f"{sum(not r.reused for r in results)} of {len(results)} stages were built",
    )
    return results


def _what(result: StageRun) -> str:
    if not result.reused:
        return "built"
    return "reused, built by earlier code" if result.older_code else "reused"

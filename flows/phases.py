"""One flow a phase: the pipeline up to the end of that phase.

What earlier phases published is reused, so a phase's flow does that phase's work and no other.
"""

from __future__ import annotations

from prefect import Flow, flow

from flows.outcome import NAME, plainly
from flows.parameters import PipelineParameters, RunParameters
from flows.pipeline import run_from_parameters
from flows.review import ReviewParameters, ask, is_resumed
from rldecoder.runner import StageRun
from rldecoder.stages.table import STAGES


def last_stage(phase: str) -> str:
    """The stage that ends a phase."""
    return [stage.name for stage in STAGES if stage.phase == phase][-1]


def _phase_flow(phase: str) -> Flow[[RunParameters], list[StageRun]]:
    until = last_stage(phase)

    @flow(
        name=phase, description=f"The pipeline up to {until}.", flow_run_name=NAME,
        persist_result=False,
    )  # fmt: skip
    def run_phase(parameters: RunParameters) -> list[StageRun]:
        whole = PipelineParameters(**parameters.model_dump(), until=until)
        return plainly(lambda: run_from_parameters(whole))

    return run_phase


prepare = _phase_flow("prepare")
features = _phase_flow("features")
decoder = _phase_flow("decoder")
rl = _phase_flow("rl")


class InterpretationParameters(ReviewParameters):
    """Which run, where it is kept, and who looks at the labels afterwards, if anyone."""

    review: bool = False
    """Ask for verdicts on the labels, as the flow `review` does, when they are made."""


@flow(
    name="interpretation",
    description=f"The pipeline up to {last_stage('interpretation')}, with a review if wanted.",
    flow_run_name=NAME,
    persist_result=False,
)
def interpretation(parameters: InterpretationParameters) -> list[StageRun]:
    """Importance, labels and clusters, and what people say of them.

    Args:
        parameters: which run, and who looks at its labels.
    """
    return plainly(lambda: _build_and_ask(parameters))


def _build_and_ask(parameters: InterpretationParameters) -> list[StageRun]:
    results: list[StageRun] = []
    if not is_resumed():  # a review that was suspended must not rebuild the labels it is about
        plain = parameters.model_dump(include=set(RunParameters.model_fields))
        until = last_stage("interpretation")
        results = run_from_parameters(PipelineParameters(**plain, until=until))
    if parameters.review:
        ask(ReviewParameters(**parameters.model_dump(exclude={"review"})))
    return results


explanations = _phase_flow("explanations")

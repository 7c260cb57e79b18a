"""What a finished stage leaves in the Prefect UI: tables of gates and targets, the report."""

from __future__ import annotations

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from rldecoder.artifacts.catalogue import DecoderGate, Evaluation, Report, SaeGate
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.gates import GateReport
from rldecoder.stages.context import Stage
from tasks.reporter import stage_key


def show_stage(stage: Stage, ref: ArtifactRef, store: ArtifactStore) -> None:
    """Publish the UI artifacts of one stage; all read from what the stage published."""
    read = stage.artifact in (SaeGate, DecoderGate, Evaluation, Report)
    folder, manifest = store.path(ref), (store.verify if read else store.manifest)(ref)
    key = stage_key(stage.name)
    about = " ".join((stage.artifact.__doc__ or "").split())

    if manifest.metrics:
        rows = [{"metric": name, "value": value} for name, value in manifest.metrics.items()]
        create_table_artifact(rows, key=key, description=f"{about} `{ref}`")

    # What a person looks for in a gate and in the targets: all rows, not the headline alone.
    if stage.artifact is SaeGate or stage.artifact is DecoderGate:
        report: GateReport = stage.artifact.report.read(folder)
        create_table_artifact(
            [{"name": name, **row} for name, row in report.rows().items()],
            key=f"{key}-gate",
            description=f"Verdict: **{manifest.verdict}**. {'; '.join(manifest.reasons)}",
        )
    if stage.artifact is Evaluation:
        create_table_artifact(
            [row.model_dump(mode="json") for row in Evaluation.targets.read(folder).root],
            key=f"{key}-targets",
            description="Every target of the original plan, with what was measured",
        )

    if stage.artifact is Report:
        page = Report.page.path(folder)
        create_link_artifact(page.as_uri(), key=f"{key}-page", link_text=str(page))
        caveats = "\n".join(f"- {caveat}" for caveat in manifest.caveats) or "none"
        create_markdown_artifact(
            f"# Report\n\n`{page}`\n\nOpen the file in a browser: browsers do not follow links "
            f"from a web page to a local file.\n\n## Caveats\n\n{caveats}\n",
            key=f"{key}-path",
        )

"""What a finished stage leaves in the Prefect UI: tables of gates and targets, the report."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from rldecoder import schemas
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.stages.context import Stage
from tasks.reporter import artifact_key


def show_stage(stage: Stage, ref: ArtifactRef, store: ArtifactStore) -> None:
    """Publish the UI artifacts of one stage; all read from what the stage published."""
    folder = store.path(ref)
    manifest = store.manifest(ref)
    key = artifact_key(stage.name)
    rows: list[dict[str, Any]] = [
        {"metric": name, "value": value} for name, value in manifest.metrics.items()
    ]
    if rows:
        create_table_artifact(rows, key=key, description=f"`{ref}`: headline numbers")
    if stage.gate and (folder / "report.json").is_file():
        create_table_artifact(
            _gate_rows(schemas.read_json(folder / "report.json")),
            key=f"{key}-gate",
            description=f"Verdict: **{manifest.verdict}**. {'; '.join(manifest.reasons)}",
        )
    if (folder / "targets.json").is_file():
        create_table_artifact(
            schemas.read_json(folder / "targets.json"),
            key=f"{key}-targets",
            description="Every target of the original plan, with what was measured",
        )
    page = folder / "report.html"
    if page.is_file():
        create_link_artifact(page.as_uri(), key=f"{key}-page", link_text=str(page))
        caveats = "\n".join(f"- {caveat}" for caveat in manifest.caveats) or "none"
        create_markdown_artifact(
            f"# Report\n\n`{page}`\n\nOpen the file in a browser: browsers do not follow links "
            f"from a web page to a local file.\n\n## Caveats\n\n{caveats}\n",
            key=f"{key}-path",
        )


def _gate_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """`report.json` (name -> value, target, met, formula) as table rows."""
    return [{"name": name, **row} for name, row in report.items() if isinstance(row, dict)]

"""Stage report: one self-contained HTML page, its figures, a summary, and Markdown pages.

Reads the artifacts of all other stages and computes nothing anew. Wall times stand on the page
and in what is made of the manifests (`reproducibility.md`, `release_notes.md`,
`logbook_entry.md`); `summary.json` and `experiment.md` are the same for the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from rldecoder import schemas
from rldecoder.config.explain import ReportConfig
from rldecoder.dashboard.build import build_report, summary
from rldecoder.dashboard.release import release_files
from rldecoder.dashboard.report import render_html, render_markdown
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

SVG_HEADER = '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n'


def run(
    inputs: Mapping[str, InputArtifact], config: ReportConfig, ctx: StageContext
) -> StageOutput:
    """Gather, draw, render."""
    with ctx.report.track("report", 3, "parts") as bar:
        data = build_report(
            inputs,
            title=config.title,
            max_features=config.max_feature_cards,
            contexts=config.contexts_per_feature,
        )
        bar.advance(1, "gathered")
        figures = ctx.out / "figures"
        figures.mkdir(parents=True, exist_ok=True)
        for name, entry in data.figures.items():
            svg = SVG_HEADER + entry.drawing.svg + "\n"
            (figures / f"{name}.svg").write_text(svg, encoding="utf-8")
            (figures / f"{name}.pdf").write_bytes(entry.drawing.pdf)
        bar.advance(1, "figures")
        html = render_html(data)
        (ctx.out / "report.html").write_text(html, encoding="utf-8")
        (ctx.out / "experiment.md").write_text(render_markdown(data), encoding="utf-8")
        for name, text in release_files(data, inputs).items():
            (ctx.out / name).write_text(text, encoding="utf-8")
        schemas.write_json(ctx.out / "summary.json", summary(data, inputs))
        bar.advance(1, "written")
    return StageOutput(
        {
            "figures": len(data.figures),
            "features_shown": len(data.features),
            "examples_shown": len(data.examples),
            "caveats": len(data.caveats),
            "report_bytes": len(html.encode()),
        }
    )

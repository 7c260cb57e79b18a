"""Stage report: one self-contained HTML page, its figures, a summary, and Markdown pages.

Reads the artifacts of all other stages and computes nothing anew. Wall times stand on the page
and in what is made of the manifests (reproducibility, release notes, logbook entry); the summary
and the experiment's page are the same for the same inputs.
"""

from __future__ import annotations

from rldecoder.artifacts.catalogue import Report
from rldecoder.config.explain import ReportConfig
from rldecoder.dashboard.build import build_report, summary
from rldecoder.dashboard.release import release_files
from rldecoder.dashboard.report import render_html, render_markdown
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import ReportInputs

SVG_HEADER = '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n'


def run(inputs: ReportInputs, config: ReportConfig, ctx: StageContext) -> Output:
    """Gather, draw, render."""
    with ctx.report.track("report", 3, "parts") as bar:
        data = build_report(inputs, title=config.title, max_features=config.max_feature_cards)
        bar.advance(1, "gathered")

        # On the page and as files of their own, for papers.
        figures = Report.figures.path(ctx.out)
        figures.mkdir(parents=True, exist_ok=True)
        for name, entry in data.figures.items():
            svg = SVG_HEADER + entry.drawing.svg + "\n"
            (figures / f"{name}.svg").write_text(svg, encoding="utf-8")
            (figures / f"{name}.pdf").write_bytes(entry.drawing.pdf)
        bar.advance(1, "figures")

        html = render_html(data)
        Report.page.path(ctx.out).write_text(html, encoding="utf-8")
        Report.experiment.path(ctx.out).write_text(render_markdown(data), encoding="utf-8")
        for name, text in release_files(data, inputs).items():
            (ctx.out / name).write_text(text, encoding="utf-8")
        summary(data, inputs).save(Report.summary.path(ctx.out))
        bar.advance(1, "written")
    return Output(
        {
            "figures": len(data.figures),
            "features_shown": len(data.features),
            "examples_shown": len(data.examples),
            "caveats": len(data.caveats),
            "report_bytes": len(html.encode()),
        }
    )

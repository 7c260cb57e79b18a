"""The table of all stages for docs/pipeline.md: `python -m rldecoder.stages.overview` prints it.

What all but the first stage read, the model, is not said nineteen times; `?` marks a file that is
there where it was asked for.
"""

from __future__ import annotations

from rldecoder.artifacts.base import Maybe
from rldecoder.stages.table import STAGES


def stage_table() -> str:
    """Markdown: every stage, what it reads, what it publishes, and under which file names."""
    lines = ["| stage | reads | publishes | files |", "|---|---|---|---|"]
    for stage in STAGES:
        reads = ", ".join(f"`{name}`" for name in stage.upstream if name != STAGES[0].name) or "-"
        if len(stage.upstream) == len(STAGES) - 1:
            reads = "all others"
        files = ", ".join(
            f"`{file.name}`" + ("?" if isinstance(file, Maybe) else "")
            for file in stage.artifact.files().values()
        )
        what = " ".join((stage.artifact.__doc__ or "").split()).removesuffix(".")
        lines.append(f"| `{stage.name}` | {reads} | {what} | {files or '-'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(stage_table(), end="")

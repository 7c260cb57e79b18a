"""The table of model types in docs/models.md, made by trying each.

`python -m tests.lm.model_table` writes it anew (some minutes); test_proof.py compares.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rldecoder.lm.random_model import make_random_model
from tests.lm.causal_architectures import ARCHITECTURES, Outcome, has_text_part, outcome

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_START, _END = "<!-- table: python -m tests.lm.model_table -->", "<!-- end of table -->"
_NUMBER = re.compile(r" by [0-9.e+-]+ of their size \(rounding in float32: at most [0-9.]+\)")


def row(found: Outcome) -> str:
    """A line of the table: no number that another machine's rounding would change."""
    if found.status == "exact":
        result = "exact (its text part)" if has_text_part(found.name) else "exact"
        return f"| `{found.name}` | {result} | |"
    if found.status == "not made":
        return f"| `{found.name}` | not tried | |"
    why = _NUMBER.sub("", found.why).replace("|", "/").replace("\n", " ").strip()
    return f"| `{found.name}` | {found.status} | {why} |"


def rows() -> dict[str, str]:
    """The lines that are in the page, by model type."""
    page = PAGE.read_text(encoding="utf-8")
    lines = page.partition(_START)[2].partition(_END)[0].splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def write(found: Iterable[Outcome]) -> None:
    """Put the table into the page."""
    found = list(found)
    counts = Counter(one.status for one in found)
    table = [
        _START,
        "",
        f"{counts['exact']} exact, {counts['refused']} refused, {counts['not made']} not tried, "
        f"{counts['wrong']} wrong.",
        "",
        "| model type | result | why |",
        "|---|---|---|",
        *map(row, found),
        "",
        _END,
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_START)
    after = rest.partition(_END)[2]
    PAGE.write_text(before + "\n".join(table) + after, encoding="utf-8")


def main() -> None:
    """Try every type."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_random_model(Path(folder) / "model", n_layer=1, d_model=16, n_head=2)
        write(outcome(name, tokenizer) for name in ARCHITECTURES)


if __name__ == "__main__":
    main()

"""The lists of model types in docs/models.md, by verdict, made by trying each.

`python -m tests.lm.model_table` writes them anew (some minutes); test_proof.py compares.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from rldecoder.lm.random_model import make_random_model
from tests.lm.causal_architectures import ARCHITECTURES, Outcome, has_text_part, outcome

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_START, _END = "<!-- lists: python -m tests.lm.model_table -->", "<!-- end of lists -->"

# What an error says of one type, and the kind of reason that the page names. The first that is
# found counts; numbers of an error, which another machine's rounding would change, are in none.
_REASONS = {
    "Found block lists": "not one list of blocks with one final norm (encoders, for one)",
    "linear attention all": "no block keeps positions",
    "names no number of blocks": "made of several parts, or not of blocks",
    "transformers has no causal language model for its text part": "no text model of its own",
    "is not proven to give alone": "its text part is not proven alone",
    "knows no such type": "no causal model in transformers",
    "an index chooses": "an index directs attention",
    "kinds of the blocks follow from their numbers": "a block's kind hangs on its number",
    "differ": "the parts give other numbers than the whole",
    "is no [B, T, D]": "more than one residual stream",
    "cannot be run by themselves": "blocks cannot be run by themselves",
    "in one pass, not once": "the final norm is used twice",
}


def verdict(found: Outcome) -> str:
    """What the page says of a type: `exact`, `refused: ` and the kind of reason, or its error."""
    if found.status == "exact":
        return "exact, its text part" if has_text_part(found.name) else "exact"
    if found.status == "not made":
        return f"cannot be built here: {found.why}"
    kinds = [kind for words, kind in _REASONS.items() if words in found.why]
    return f"{found.status}: {kinds[0] if kinds else 'for a reason of its own'}"


def verdicts() -> dict[str, str]:
    """What is in the page, by model type; a type that is there twice is an error."""
    lists = PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    found: dict[str, str] = {}
    for said, names in re.findall(
        r"^- \*\*(.*?)\*\*(.*?)(?=^- |\Z)", lists, re.DOTALL | re.MULTILINE
    ):
        for name in re.findall(r"`([^`]+)`", names):
            assert name not in found, f"docs/models.md lists {name} twice"
            found[name] = said
    return found


def lines(said: Mapping[str, str]) -> list[str]:
    """The lists: verdicts by their first word, the largest group first."""
    counts = Counter(one.split(":")[0].split(",")[0] for one in said.values())
    groups = Counter(said.values())
    order = ("exact", "refused", "cannot be built here", "wrong")
    said_of = [one for one in order if counts[one] or one == "wrong"]
    page = [f"{', '.join(f'{counts[one]} {one}' for one in said_of)}.", ""]
    for one in sorted(groups, key=lambda g: (order.index(re.split("[:,]", g)[0]), -groups[g], g)):
        names = " ".join(f"`{name}`" for name in sorted(n for n, v in said.items() if v == one))
        page += textwrap.wrap(
            f"- **{one}** {names}", 100, subsequent_indent="  ",
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    return page


def write(said: Mapping[str, str]) -> None:
    """Put the lists into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_START)
    after = rest.partition(_END)[2]
    page = "\n".join([_START, "", *lines(said), "", _END])
    PAGE.write_text(before + page + after, encoding="utf-8")


def try_all(found: Iterable[Outcome]) -> dict[str, str]:
    """Verdicts by model type."""
    return {one.name: verdict(one) for one in found}


def main() -> None:
    """Try every type."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_random_model(Path(folder) / "model", n_layer=1, d_model=16, n_head=2)
        write(try_all(outcome(name, tokenizer) for name in ARCHITECTURES))


if __name__ == "__main__":
    main()

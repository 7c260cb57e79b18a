"""The command `settings`: every setting with its meaning, unit and default."""

from __future__ import annotations

import difflib
import textwrap

from rich.console import Console

from rldecoder.config.described import Section, Setting, sections, stages
from rldecoder.errors import BadInputError

_WIDEST = 100
_INDENT = "    "


def show_settings(which: str | None, console: Console) -> None:
    """All sections with what they are for; or the settings of one, or one setting.

    Args:
        which: a section (`train_sae`, `tracking`), `run` for those of none, or a setting's name.

    Raises:
        BadInputError: there is no such stage or setting; what it is like is named.
    """
    width = min(console.width, _WIDEST)
    if which is None:
        lines = [f"{name:<18} {text}" for name, text in stages().items()]
        lines.insert(0, f"{'run':<18} Name, seed, store, device and the like: outside all stages.")
        # wandb, Ray and buckets have sections too, and nothing else would tell their names.
        lines += [f"{one.name:<18} {one.meaning}" for one in sections() if _beside_stages(one)]
        for line in lines:
            _print(console, textwrap.fill(line, width, subsequent_indent=" " * 19))
        _print(console, "\nrldecoder settings NAME lists the settings of one, with their meaning.")
        return
    chosen = _chosen(which)
    if not chosen:
        names = [*stages(), *(one.name for part in sections() for one in part.settings)]
        near = difflib.get_close_matches(which, names, 3)
        raise BadInputError(
            f"There is no stage or setting {which!r}.",
            f"Did you mean {' or '.join(near)}?" if near else "",
            "`rldecoder settings` lists the stages.",
        )
    for section in chosen:
        title = section.name or "run (no section: these stand at the left)"
        _print(console, textwrap.fill(f"# {title}: {section.meaning}", width) + "\n")
        for setting in section.settings:
            _print(console, described(setting, width))
        _print(console, "")


def described(setting: Setting, width: int) -> str:
    """A setting's name, default and kind in one line, its meaning in those below."""
    head = f"{setting.name}: {setting.default}   ({setting.kind})"
    return "\n".join(
        [
            textwrap.fill(head, width, subsequent_indent=_INDENT * 2, break_on_hyphens=False),
            textwrap.fill(
                setting.meaning, width, initial_indent=_INDENT, subsequent_indent=_INDENT
            ),
        ]
    )


def _chosen(which: str) -> list[Section]:
    """The sections of a stage, or one that holds the setting of that name alone."""
    name = "" if which == "run" else which
    found = [one for one in sections() if one.name.split(" ")[0].split("[")[0] == name]
    if name in stages():
        found = [one for one in sections() if (one.name + ".").startswith((f"{name}.", f"{name}["))]
    if found:
        return found
    for section in sections():
        alone = tuple(one for one in section.settings if one.name == which)
        if alone:
            return [section._replace(settings=alone)]
    return []


def _beside_stages(section: Section) -> bool:
    """Whether it is a section of the run that belongs to no stage, such as `tracking`."""
    return section.name.isidentifier() and section.name not in stages()


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)

"""The command that writes a release of a run, and uploads one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.markup import escape

from rldecoder.errors import BadInputError

if TYPE_CHECKING:
    from rldecoder.run import Run

RELEASE = "release"
"""Where other exports name a tool."""


class Publishing(NamedTuple):
    """What is to happen to a release that lies on the disk."""

    push: str | None
    """The repository, None for none."""
    dry_run: bool
    public: bool

    def check(self) -> None:
        """Refuse what cannot be meant, before anything is written.

        Raises:
            BadInputError: options without --push, or no repository's name.
        """
        if self.push is None:
            if self.dry_run or self.public:
                raise BadInputError(
                    f"{'--dry-run' if self.dry_run else '--public'} goes with --push.",
                    "Without it nothing is uploaded.",
                    "Add --push owner/name.",
                )
            return
        from rldecoder.release.hub import require_repo

        require_repo(self.push)

    def require_release(self, tool: str, more: bool) -> None:
        """Refuse options of releases for another tool.

        Args:
            more: whether one of the others was given.

        Raises:
            BadInputError: one was given.
        """
        if more or any(self):
            raise BadInputError(
                f"--push, --dry-run, --public, --overwrite, --supervised and --licence are for a "
                f"{RELEASE}.",
                f"This exports for {tool}.",
                "Leave them out, or export a release.",
            )


def export_release(
    run: Run,
    out: Path,
    publishing: Publishing,
    console: Console,
    *,
    supervised: bool,
    overwrite: bool,
    licence: str | None,
) -> None:
    """Write a run's release, and upload it where that was asked for.

    Raises:
        BadInputError: the run has not come so far, `out` holds something, or see `push_release`.
    """
    from rldecoder.release.writing import write_release

    manifest = write_release(run, out, supervised=supervised, overwrite=overwrite, licence=licence)
    size = sum(entry.size for entry in manifest.files.values())
    console.print(
        f"written: {escape(str(out))}   {len(manifest.files)} files, {size / 1e6:,.1f} MB"
    )
    people = sorted({review.reviewer for label in run.labels.values() for review in label.reviews})
    if people:
        console.print(
            f"[yellow]note[/yellow] its labels name their reviewers: {escape(', '.join(people))}"
        )
    _upload(out, publishing, console)
    console.print(
        f"open it: rldecoder explain --release {escape(shlex.quote(str(out)))} PROMPT",
        soft_wrap=True,
    )


def push_folder(
    root: Path, publishing: Publishing, console: Console, superfluous: Sequence[str]
) -> None:
    """Upload a release that is there already.

    Args:
        superfluous: options that were given and have no meaning here.

    Raises:
        BadInputError: nothing was asked for, or see `push_release`.
    """
    publishing.check()
    if publishing.push is None or superfluous:
        raise BadInputError(
            f"{', '.join(superfluous)} have no meaning for a release that is there already."
            if superfluous
            else f"Nothing is to be done with the release {root}.",
            "To write one, name the config of the run.",
            f"Examples: rldecoder export CONFIG {RELEASE} DIR; "
            f"rldecoder export {RELEASE} DIR --push owner/name",
        )
    _upload(root, publishing, console)


def _upload(root: Path, publishing: Publishing, console: Console) -> None:
    if publishing.push is None:
        return
    from rldecoder.release.hub import push_release

    done = push_release(root, publishing.push, public=publishing.public, dry_run=publishing.dry_run)
    seen = "private" if done.private else "public"
    if done.commit is not None:
        console.print(f"uploaded to {escape(done.commit)} ({seen})")
        return
    for name, size in sorted(done.files.items()):
        console.print(f"{size:>14,}  {escape(name)}", soft_wrap=True)
    console.print(
        f"{sum(done.files.values()):>14,}  bytes in {len(done.files)} files would go to "
        f"{escape(done.repo)} ({seen}); nothing was sent",
        soft_wrap=True,
    )

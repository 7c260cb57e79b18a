"""A run: a config and a store, and the published, verified artifacts that they name.

Notebooks, the server and the commands open models, labels and tables through it, each once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rldecoder.artifacts.catalogue import Corpus, Report
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.opened import A, Named, Opened, stage_name
from rldecoder.runner import open_artifact, plan, store_for
from rldecoder.stages.table import STAGES

if TYPE_CHECKING:
    import torch

    from rldecoder.artifacts.base import Artifact


def open_run(
    config: Path | str | RunConfig,
    store: Path | str | ArtifactStore | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Run:
    """Open a run that `rldecoder run` has built, or the part of it that is there.

    Nothing is built or loaded yet.

    Args:
        config: a run's YAML, or what was loaded from one.
        store: where the artifacts are, a folder or `s3://bucket/prefix`; None: the config's
            `store`.

    Raises:
        BadInputError: the config cannot be used.
    """
    loaded = config if isinstance(config, RunConfig) else load_run_config(Path(config))
    if not isinstance(store, ArtifactStore):
        store = store_for(loaded, store)
    run = Run(loaded, store, device=device)
    if not isinstance(config, RunConfig):
        run.python = python_lines(Path(config), store)
    return run


def python_lines(
    config: Path, store: ArtifactStore, overrides: Sequence[str] = ()
) -> tuple[str, ...]:
    """Lines of Python that open a run as `run`, from any folder.

    Args:
        overrides: `a.b=c` settings that were put over those of the file.
    """
    file, root = ascii(str(config.resolve())), ascii(store.place)
    if not overrides:
        return (f"run = rldecoder.open_run({file}, {root})",)
    return (
        "from rldecoder.config.run import load_run_config",
        f"config = load_run_config({file}, {list(overrides)!a})",
        f"run = rldecoder.open_run(config, {root})",
    )


class Run(Opened):
    """A run's artifacts, models and labels; each is verified and loaded once, when asked for.

    Args:
        config: decides what the artifacts are.
        refs: the address of every artifact, where a run that has just ended knows them.
    """

    def __init__(
        self,
        config: RunConfig,
        store: ArtifactStore,
        *,
        device: torch.device | str = "cpu",
        refs: Mapping[str, ArtifactRef] | None = None,
    ) -> None:
        super().__init__(device)
        self.config, self.store = config, store
        self.made_by = "rldecoder run CONFIG"
        """The command that makes the run, said where something of it is missing."""
        self._refs = refs

    def __repr__(self) -> str:
        published, damaged = self.look()
        facts = [f"{len(published)} of {len(STAGES)} stages in {self.store.place}"]
        facts += [f"{one.stage}: {one.verdict}" for one in published if one.verdict is not None]
        if damaged:
            facts.append(f"damaged: {', '.join(damaged)}")
        return f"<Run {self.config.name}: {'; '.join(facts)}>"

    def _repr_html_(self) -> str:
        from rldecoder.dashboard.notebook import run_html

        published, damaged = self.look()
        return run_html(self.config.name, self.store.place, published, damaged)

    @cached_property
    def refs(self) -> Mapping[str, ArtifactRef]:
        """The address of every stage's artifact, published or not."""
        return plan(self.config) if self._refs is None else self._refs

    def missing(self, which: Iterable[Named] | None = None) -> list[str]:
        """Names of the stages that have not published yet.

        Args:
            which: those to ask about; None: all.
        """
        names = [stage.name for stage in STAGES] if which is None else map(stage_name, which)
        return [name for name in names if not self.store.is_published(self.refs[name])]

    def look(self) -> tuple[list[Artifact], list[str]]:
        """What is published, by its manifests alone, and the stages whose manifest is damaged.

        To be shown, not to be worked with: the other files are not read, which may be gigabytes.
        """
        published, damaged = [], []
        for stage in STAGES:
            ref = self.refs[stage.name]
            if not self.store.is_published(ref):
                continue
            try:
                manifest = self.store.manifest(ref)
            except DamagedFileError:
                damaged.append(stage.name)
            else:
                published.append(stage.artifact.opened(self.store.path(ref), manifest))
        return published, damaged

    def require(self, which: Iterable[Named] | None = None, purpose: str = "") -> None:
        """Refuse to go on without some artifacts.

        Args:
            which: the stages that must have published; None: all.
            purpose: what they are needed for, such as `to explain`.

        Raises:
            BadInputError: one is missing.
        """
        missing = self.missing(which)
        if missing:
            last = max(missing, key=[stage.name for stage in STAGES].index)
            raise BadInputError(
                f"The run {self.config.name} has not come far enough{purpose and f' {purpose}'}.",
                f"Missing in {self.store.place}: {', '.join(missing)}.",
                f"Make it: {self.made_by}{self._until(last)}{self._release_here()}",
            )

    def _until(self, last: str) -> str:
        return "" if last == STAGES[-1].name else f" --until {last}"

    def _release_here(self) -> str:
        """Where a release of this run lies in the current folder, how to open it."""
        from rldecoder.artifacts.manifests import MANIFEST

        for folder in sorted(Path().glob(f"*/{MANIFEST}")):
            if f'"name": "{self.config.name}"' in folder.read_text("utf-8", "replace"):
                return f"\nOr open the release that is here: --release {folder.parent}"
        return ""

    @property
    def name(self) -> str:
        """The config's name."""
        return self.config.name

    @property
    def threads(self) -> int | None:
        """As the config says."""
        return self.config.threads

    @property
    def reviews(self) -> Path:
        """The config's file of verdicts, or the store's."""
        from rldecoder.interp.review import REVIEWS_FILE

        return self.config.label_features.reviews or self.store.root / REVIEWS_FILE

    @property
    def sources(self) -> tuple[str, ...]:
        """As the corpus says."""
        names = self.artifact(Corpus).provenance.sources
        return tuple(name.rstrip("/").rpartition("/")[2] for name in names)

    def report(self, say: Callable[[str], None]) -> bytes | None:
        """The report as it was published, read once; None where there is none to trust."""
        if self.missing([Report]):
            return None
        ref = self.refs[Report.stage]
        try:
            entry = self.store.verify(ref).files[Report.page.name]
            content = Report.page.path(self.store.path(ref)).read_bytes()
        except (DamagedFileError, KeyError, OSError) as error:
            say(f"The report is not served: {error}")
            return None
        # Of these bytes, not of what lay there when the store last looked.
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            say("The report is not served: it was changed after it was published.")
            return None
        return content

    def _open(self, kind: type[A]) -> A:
        return open_artifact(kind, self.refs[kind.stage], self.store)

"""What a release of a run needs, from its manifests alone: checklist, notes, logbook entry."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rldecoder.artifacts.catalogue import (
    FinalDecoder,
    Labels,
    Report,
    SupervisedDecoder,
    TrainedExplainer,
    TrainedSae,
)
from rldecoder.artifacts.manifests import MANIFEST, ArtifactRef, Manifest, read_manifest
from rldecoder.dashboard.report import ReportData, environment
from rldecoder.visible_text import visible_text

if TYPE_CHECKING:
    from rldecoder.stages.inputs import ReportInputs

PAGES = (Report.reproducibility, Report.release_notes, Report.logbook_entry)
"""Each has a template of its name."""
CONTENTS = (TrainedSae, SupervisedDecoder, FinalDecoder, Labels, TrainedExplainer)
"""What a release is made of."""
DIRTY = "-dirty"
"""What `git describe` appends to a commit when files differ from it."""


class Document(NamedTuple):
    """One document of the corpus."""

    split: str
    sha256: str


class Check(NamedTuple):
    """One line of the checklist."""

    question: str
    holds: bool | None
    """None where the manifests cannot tell."""
    detail: str


def release_files(data: ReportData, inputs: ReportInputs) -> dict[str, str]:
    """Markdown by file name.

    Args:
        inputs: each with its manifest in its folder.
    """
    manifests = {
        artifact.stage: read_manifest(
            artifact.folder / MANIFEST,
            ArtifactRef(kind=artifact.kind, stage=artifact.stage, digest=artifact.digest),
        )
        for artifact in inputs
    }
    model = inputs.model.record
    columns = inputs.corpus.documents.select(Document._fields).to_pylist()
    documents = [Document(**row) for row in columns]

    # One set of values for all pages; each template takes what it shows.
    values = {
        "title": data.title,
        "subtitle": data.subtitle,
        "caveats": data.caveats,
        "targets": data.targets,
        "checks": checklist(
            manifests, documents, weights_sha256=model.weights_sha256, licence=model.licence
        ),
        "contents": [kind.stage for kind in CONTENTS],
        "model": {name: visible_text(str(value), 200) for name, value in model},
        "tokens": inputs.cache.meta.tokens,
        "packages": _packages(manifests.values()),
        "manifests": list(manifests.values()),
        "started": min(manifest.created_at for manifest in manifests.values())[:10],
        "wall": sum(manifest.wall_seconds for manifest in manifests.values()),
        "machines": sorted({manifest.device_name for manifest in manifests.values()}),
        "freeze_note": data.freeze_note,
    }

    templates = environment(autoescape=False)
    return {
        page.name: templates.get_template(f"{page.name}.j2").render(**values).rstrip() + "\n"
        for page in PAGES
    }


def checklist(
    manifests: Mapping[str, Manifest],
    documents: Sequence[Document],
    *,
    weights_sha256: str,
    licence: str,
) -> list[Check]:
    """What can be said about whether others would get the same numbers.

    Args:
        manifests: by stage.
        weights_sha256, licence: of the frozen model; "" where not known.
    """
    commits = {manifest.git_commit for manifest in manifests.values()}
    threads = sorted({manifest.threads for manifest in manifests.values()})
    devices = sorted({manifest.device for manifest in manifests.values()})
    differing = {name: seen for name, seen in _packages(manifests.values()) if len(seen) > 1}
    resumed = [name for name, manifest in manifests.items() if manifest.resumed]
    failed = [name for name, manifest in manifests.items() if manifest.verdict == "fail"]
    # A manifest without a hash for a file cannot be read at all; one without files can.
    unnamed = [f"{name} has no file" for name, manifest in manifests.items() if not manifest.files]
    num_files = sum(len(manifest.files) for manifest in manifests.values())

    splits: dict[str, set[str]] = {}
    for document in documents:
        splits.setdefault(document.sha256, set()).add(document.split)
    shared = sum(len(of_text) > 1 for of_text in splits.values())
    return [
        Check("Every file is named by its sha256", not unnamed,
              ", ".join(unnamed) or f"{num_files} files"),
        Check("Every stage has its seed", True, "derived from the run's one seed"),
        _one_commit(commits),
        Check("All stages ran with the same packages", not differing,
              "; ".join(f"{name} {', '.join(seen)}" for name, seen in differing.items())),
        Check("All stages ran on the CPU with equal threads, where results repeat bit for bit",
              devices == ["cpu"] and len(threads) == 1,
              f"devices {', '.join(devices)}; threads {', '.join(map(str, threads))}"),
        Check("The model's weights are named by their sha256", bool(weights_sha256),
              weights_sha256[:16]),
        Check("The model's licence is known", bool(licence), licence),
        Check("No document is in two splits", not shared if documents else None,
              f"{len(documents):,} documents, {shared:,} of them in two; compared by sha256"),
        Check("No stage was interrupted and resumed", not resumed, ", ".join(resumed)),
        Check("Every gate passed", not failed, ", ".join(failed)),
    ]  # fmt: skip


def _one_commit(commits: Collection[str | None]) -> Check:
    """A commit that ends in `-dirty` names no state of the code that others could check out."""
    question = "All stages come from one commit"
    named = sorted(commit for commit in commits if commit is not None)
    detail = ", ".join(named)
    if dirty := [commit for commit in named if commit.endswith(DIRTY)]:
        return Check(question, False, f"{detail}; {len(dirty)} with changes not committed")
    if len(named) > 1:
        return Check(question, False, detail)
    if len(named) < len(commits) or not named:
        return Check(question, None, "built outside a checkout")
    return Check(question, True, detail)


def _packages(manifests: Iterable[Manifest]) -> list[tuple[str, list[str]]]:
    """Every package with the versions that were seen, by name."""
    seen: dict[str, set[str]] = {}
    for manifest in manifests:
        for name, version in manifest.packages.items():
            seen.setdefault(name, set()).add(version)
    return [(name, sorted(versions)) for name, versions in sorted(seen.items())]

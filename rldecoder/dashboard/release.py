"""What a release of a run needs, from its manifests alone: checklist, notes, logbook entry."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rldecoder import schemas
from rldecoder.dashboard.collect import Published, format_seconds
from rldecoder.dashboard.report import ReportData, environment
from rldecoder.explain.text import visible_text

FILES = {
    "reproducibility.md": "reproducibility.md.j2",
    "release_notes.md": "release_notes.md.j2",
    "logbook_entry.md": "logbook_entry.md.j2",
}
MANIFEST = "manifest.json"
DIRTY = "-dirty"
"""What `git describe` appends to a commit when files differ from it."""


class Check(NamedTuple):
    """One line of the checklist."""

    question: str
    holds: bool | None
    """None where the manifests cannot tell."""
    detail: str


def release_files(data: ReportData, inputs: Mapping[str, Published]) -> dict[str, str]:
    """Markdown by file name.

    Args:
        data: what the report shows.
        inputs: the artifacts of all other stages, each with its manifest in its folder.
    """
    manifests = {
        name: schemas.read_json(artifact.path / MANIFEST) for name, artifact in inputs.items()
    }
    model = schemas.read_json(inputs["sync_tokenizer"].path / "model.json")
    meta = schemas.read_json(inputs["cache_activations"].path / "meta.json")
    documents = schemas.read_parquet(
        inputs["ingest"].path / "documents.parquet", ["split", "sha256"]
    ).to_pylist()
    values = {
        "title": data.title,
        "subtitle": data.subtitle,
        "caveats": data.caveats,
        "targets": data.targets,
        "checks": checklist(manifests, model, documents),
        "model": {key: visible_text(str(value), 200) for key, value in model.items()},
        "tokens": meta["tokens"],
        "packages": _packages(manifests.values()),
        "stages": [_stage(name, manifest) for name, manifest in manifests.items()],
        "started": min(str(manifest["created_at"]) for manifest in manifests.values())[:10],
        "wall": format_seconds(sum(m["wall_seconds"] for m in manifests.values())),
        "machines": sorted({str(m["device_name"]) for m in manifests.values()}),
        "freeze_note": data.freeze_note,
    }
    templates = environment(autoescape=False)
    return {
        name: templates.get_template(template).render(**values).rstrip() + "\n"
        for name, template in FILES.items()
    }


def checklist(
    manifests: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    documents: Sequence[Mapping[str, Any]],
) -> list[Check]:
    """What can be said about whether others would get the same numbers.

    Args:
        manifests: by stage.
        model: `model.json`.
        documents: split and sha256 of every row of `documents.parquet`.
    """
    commits = {manifest["git_commit"] for manifest in manifests.values()}
    threads = sorted({int(manifest["threads"]) for manifest in manifests.values()})
    devices = sorted({str(manifest["device"]) for manifest in manifests.values()})
    differing = {name: seen for name, seen in _packages(manifests.values()) if len(seen) > 1}
    resumed = [name for name, manifest in manifests.items() if manifest["resumed"]]
    failed = [name for name, manifest in manifests.items() if manifest["verdict"] == "fail"]
    unnamed = [
        f"{stage}/{name}" if name else f"{stage} has no file"
        for stage, manifest in manifests.items()
        for name, file in (manifest["files"] or {"": {}}).items()
        if not file.get("sha256")
    ]
    num_files = sum(len(manifest["files"]) for manifest in manifests.values())
    shared = _shared_documents(documents)
    return [
        Check("Every file is named by its sha256", not unnamed,
              ", ".join(unnamed) or f"{num_files} files"),
        Check("Every stage has its seed", all(m["seed"] is not None for m in manifests.values()),
              "derived from the run's one seed"),
        _one_commit(commits),
        Check("All stages ran with the same packages", not differing,
              "; ".join(f"{name} {', '.join(seen)}" for name, seen in differing.items())),
        Check("All stages ran on the CPU with equal threads, where results repeat bit for bit",
              devices == ["cpu"] and len(threads) == 1,
              f"devices {', '.join(devices)}; threads {', '.join(map(str, threads))}"),
        Check("The model's weights are named by their sha256", bool(model.get("weights_sha256")),
              str(model.get("weights_sha256", ""))[:16]),
        Check("The model's licence is known", bool(model.get("licence")),
              str(model.get("licence") or "")),
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


def _shared_documents(documents: Sequence[Mapping[str, Any]]) -> int:
    """How many texts lie in more than one split."""
    splits: dict[str, set[str]] = {}
    for row in documents:
        splits.setdefault(row["sha256"], set()).add(row["split"])
    return sum(len(found) > 1 for found in splits.values())


def _packages(manifests: Any) -> list[tuple[str, list[str]]]:
    """Every package with the versions that were seen, by name."""
    seen: dict[str, set[str]] = {}
    for manifest in manifests:
        for name, version in manifest["packages"].items():
            seen.setdefault(name, set()).add(str(version))
    return [(name, sorted(versions)) for name, versions in sorted(seen.items())]


def _stage(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    memory = manifest["peak_memory_bytes"]
    reasons: Sequence[str] = manifest["reasons"]
    return {
        "name": name,
        "digest": manifest["digest"],
        "version": manifest["version"],
        "seed": manifest["seed"],
        "device": manifest["device"],
        "wall": format_seconds(manifest["wall_seconds"]),
        "memory": "" if memory is None else f"{memory / 2**30:.1f} GiB",
        "verdict": manifest["verdict"],
        "reasons": [visible_text(reason, 300) for reason in reasons],
    }

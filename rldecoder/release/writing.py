"""Writing a release: copies that are checked, a card, a sealed manifest; whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import rldecoder
from rldecoder import files
from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import CATALOGUE, FinalDecoder, ModelFolder
from rldecoder.artifacts.manifests import (
    MANIFEST,
    ArtifactRef,
    FileEntry,
    Manifest,
    read_manifest,
    write_sealed,
)
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError, DamagedFileError, RlDecoderError
from rldecoder.json_records import read_json, write_json
from rldecoder.release.contents import (
    CORPUS,
    PIN,
    SETTINGS,
    ReleasedCorpus,
    ReleaseInputs,
    Settings,
    SupervisedInputs,
    folder_of,
    released_files,
)
from rldecoder.release.leaks import require_no_leaks, without_places
from rldecoder.release.manifest import (
    CARD,
    FORMAT,
    SCHEMA_VERSION,
    ReleasedArtifact,
    ReleaseManifest,
    read_release,
)

if TYPE_CHECKING:
    from rldecoder.lm.pins import ModelPin
    from rldecoder.run import Run

UNSEALED = "0" * 64
DECODER_CONFIG = f"{FinalDecoder.decoder.name}/config.json"
"""Of a decoder, in its artifact's folder; transformers names it."""


def write_release(
    run: Run,
    out: Path,
    *,
    supervised: bool = False,
    overwrite: bool = False,
    licence: str | None = None,
) -> ReleaseManifest:
    """Write a run's release into a folder of its own.

    Args:
        out: does not exist yet, or is empty; with `overwrite` it may be an older release.
        supervised: add the supervised decoder.
        licence: of what is ours, for the card; None: the model's.

    Raises:
        BadInputError: the run has not come so far, `out` holds something, or what would be
            released names a place or a key.
        DamagedFileError: an artifact is not what was published.
        NoResourceError: the disk is full or read-only.
    """
    _require_free(out, overwrite)
    inputs = run.inputs(ReleaseInputs, "to be released")
    artifacts: list[Artifact] = list(inputs)
    if supervised:
        artifacts += run.inputs(SupervisedInputs, "to be released with its supervised decoder")
    artifacts.sort(key=lambda artifact: [kind.stage for kind in CATALOGUE].index(artifact.stage))
    manifests = {artifact.stage: _store_manifest(artifact) for artifact in artifacts}

    with files.explained(out.absolute().parent, "writing a release"), _aside(out) as draft:
        for artifact in artifacts:
            _copy(artifact, manifests[artifact.stage], draft)
        pin = _pin(run, inputs.model)
        pin.save(draft / PIN)
        corpus = ReleasedCorpus.of(inputs.corpus.provenance)
        corpus.save(draft / CORPUS)
        _settings(run.config).save(draft / SETTINGS)

        # The card is written from what is released, and is sealed with it.
        manifest = _manifest(run.name, inputs, manifests)
        from rldecoder.release.card import model_card

        card = model_card(inputs, manifest, pin, corpus, licence)
        (draft / CARD).write_text(card, encoding="utf-8")
        names = _names(draft)
        require_no_leaks(draft, names, _places(run))
        manifest = manifest.model_copy(update={"files": _entries(draft, names)})
        return write_sealed(draft / MANIFEST, manifest)


def _require_free(out: Path, overwrite: bool) -> None:
    """Nothing is lost but, on request, an older release."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_release(out)
    except RlDecoderError as error:
        raise BadInputError(
            f"{out} holds something already, which is no release.",
            f"{error.what} {error.why}".strip(),
            "Name a folder that does not exist yet.",
        ) from None
    if not overwrite:
        raise BadInputError(
            f"{out} is a release already.",
            "Whoever has opened it would find another one.",
            "Name another folder, or add --overwrite.",
        )


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` when all in it is on the disk."""
    out = out.absolute()
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    files.remove(draft)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in sorted(draft.rglob("*")):
            files.fsync(path)
        files.fsync(draft)
        old = None
        if out.is_dir() and any(out.iterdir()):  # a folder cannot be renamed onto a full one
            old = out.rename(files.move_aside_name(out, "replaced"))
        draft.replace(out)
        files.fsync(out.parent)
        if old is not None:
            files.remove(old)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _store_manifest(artifact: Artifact) -> Manifest:
    ref = ArtifactRef(kind=artifact.kind, stage=artifact.stage, digest=artifact.digest)
    return read_manifest(artifact.folder / MANIFEST, ref)


def _copy(artifact: Artifact, manifest: Manifest, draft: Path) -> None:
    kind = next(kind for kind in CATALOGUE if kind.stage == artifact.stage)
    for name in released_files(kind, manifest):
        target = folder_of(kind, draft) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.folder / name, target)
        if files.hash_file(target) != manifest.files[name].sha256:
            raise DamagedFileError(
                f"{artifact.folder / name} is not what was published.",
                "It has another SHA-256 than its manifest says.",
                "Run again with the config that built it: it is built anew.",
            )
        if name == DECODER_CONFIG:
            _forget_folder(target)


def _forget_folder(path: Path) -> None:
    """Decoders with blocks, as older versions made them, name the folder of their frozen model."""
    from rldecoder.decoder.configuration_sae_decoder import without_folder

    settings = read_json(path)
    blocks = settings.get("block_config")
    if blocks is not None and without_folder(blocks) != blocks:
        settings["block_config"] = without_folder(blocks)
        write_json(path, settings)


def _pin(run: Run, model: ModelFolder) -> ModelPin:
    from rldecoder.config.model import RANDOM
    from rldecoder.lm.pins import RandomSource, pin_model
    from rldecoder.lm.registry import choose_model

    config = run.config.sync_tokenizer
    if config.model == RANDOM:
        seed = _store_manifest(model).seed
        return pin_model(
            model.model, model.record, [RandomSource(seed=seed, sizes=config.random_model)]
        )
    choice = choose_model(
        config.model, path=config.path, repo=config.repo, revision=config.revision
    )
    sources = () if choice.spec is None else choice.spec.sources
    return pin_model(model.model, model.record, sources)


def _settings(config: RunConfig) -> Settings:
    stages = {kind.stage: config.stage(kind.stage).digest_fields() for kind in CATALOGUE}
    return Settings(name=config.name, seed=config.seed, stages=without_places(stages))


def _manifest(name: str, inputs: ReleaseInputs, manifests: dict[str, Manifest]) -> ReleaseManifest:
    # Dated by the last artifact: a run that is released twice gives the same bytes.
    last = max(manifests.values(), key=lambda manifest: manifest.created_at)

    return ReleaseManifest(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        label_schema=inputs.labels.labels.schema_version,
        name=name,
        built_at=last.created_at,
        program=rldecoder.__version__,
        git_commit=last.git_commit,
        packages=last.packages,
        artifacts={
            stage: ReleasedArtifact(
                kind=manifest.kind,
                digest=manifest.digest,
                version=manifest.version,
                seed=manifest.seed,
                metrics=manifest.metrics,
                verdict=manifest.verdict,
                caveats=tuple(manifest.caveats),
            )
            for stage, manifest in manifests.items()
        },
        files={},
        seal=UNSEALED,
    )


def _places(run: Run) -> list[Path | str]:
    """Paths that the run's config names."""
    found: list[Path | str] = [run.store.root]
    values = [run.config.model_dump(mode="json")]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and value.startswith(("/", "~")):
            found.append(value)
    return found


def _names(draft: Path) -> list[str]:
    return sorted(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())


def _entries(draft: Path, names: list[str]) -> dict[str, FileEntry]:
    return {
        name: FileEntry(size=(draft / name).stat().st_size, sha256=files.hash_file(draft / name))
        for name in names
    }

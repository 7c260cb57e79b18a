"""Runs stages against a store: reuse, lock, build, publish, judge. Knows no Prefect."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rldecoder import devices, interrupts, provenance
from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.opening import open_store
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore, Manifest, artifact_digest
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError, GateFailedError, NumericalError
from rldecoder.executors.local import Executor, LocalExecutor
from rldecoder.failures import translated
from rldecoder.json_records import Scalar
from rldecoder.reporting import Reporter, interruptible
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages import preflight
from rldecoder.stages.context import Output, Stage, StageContext
from rldecoder.stages.table import STAGES, stage_named

A = TypeVar("A", bound=Artifact)


class StageRun(NamedTuple):
    """What became of one stage in one run."""

    ref: ArtifactRef
    reused: bool
    verdict: str | None
    caveats: tuple[str, ...]
    metrics: dict[str, Scalar]
    wall_seconds: float
    """Time spent now: near zero when reused."""
    older_code: bool = False
    """Reused, and the stage's code has changed since. Where that alters results, its version has to
    be raised."""


def plan(run: RunConfig) -> dict[str, ArtifactRef]:
    """The address of every stage's artifact, in order, without running anything.

    Raises:
        BadInputError: what the run reads from outside the store is missing, or does not fit it.
    """
    preflight.check(run)
    refs: dict[str, ArtifactRef] = {}
    for stage in STAGES:
        refs[stage.name] = _ref(run, stage, refs)[0]
    return refs


def run_stage(
    run: RunConfig,
    stage_name: str,
    refs: Mapping[str, ArtifactRef],
    *,
    store: ArtifactStore,
    report: Reporter,
    device: str | None = None,
) -> StageRun:
    """Reuse a stage's artifact, or build and publish it.

    Args:
        refs: at least the artifacts that the stage reads.
        device: a torch device; None takes CUDA when there is one.

    Raises:
        GateFailedError: an upstream gate, or this one, said no and its `on_fail` is `stop`.
            The artifact of a failed gate is published all the same.
        RlDecoderError: anything that can be foreseen, such as a full disk, as one of our own.
        KeyboardInterrupt: the process was asked to stop; nothing computed since is published.
    """
    with translated(stage_name), store.session():
        return _run_stage(
            run, stage_named(stage_name), refs,
            store=store, report=interruptible(report), device=device,
        )  # fmt: skip


def _run_stage(
    run: RunConfig,
    stage: Stage,
    refs: Mapping[str, ArtifactRef],
    *,
    store: ArtifactStore,
    report: Reporter,
    device: str | None,
) -> StageRun:
    interrupts.check()
    started = time.monotonic()
    ref, fingerprint, seed = _ref(run, stage, refs)
    inputs = open_inputs(stage, refs, store)
    _refuse_failed_gates(run, stage, inputs)

    # Under the lock, so that of two runs one builds and the other finds it built.
    with store.lock(ref, report.note):
        manifest = store.existing(ref, report.note, report.alert)
        reused = manifest is not None
        if manifest is None:
            if "model" in stage.reads and "sae" not in stage.reads:
                preflight.check(run, inputs.model)
            manifest = _build(
                run, stage, ref, fingerprint, seed, inputs,
                store=store, report=report, device=device, refs=refs,
            )  # fmt: skip

    result = StageRun(
        ref, reused, manifest.verdict, tuple(manifest.caveats), dict(manifest.metrics),
        time.monotonic() - started,
        reused and manifest.source_digest != provenance.source_digest(stage.module),
    )  # fmt: skip
    if stage.gate and manifest.verdict == "fail":
        _judge(run, stage, store, ref, manifest, report)
    interrupts.check()
    return result


def run_pipeline(
    run: RunConfig,
    *,
    store: ArtifactStore,
    report: Reporter,
    until: str | None = None,
    device: str | None = None,
    on_stage: Callable[[Stage, StageRun], None] | None = None,
) -> list[StageRun]:
    """Run all stages in order, up to and including `until`."""
    if until is not None:
        stage_named(until)
    preflight.check(run)
    refs: dict[str, ArtifactRef] = {}
    results = []
    for stage in STAGES:
        result = run_stage(run, stage.name, refs, store=store, report=report, device=device)
        refs[stage.name] = result.ref
        results.append(result)
        if on_stage is not None:
            on_stage(stage, result)
        if stage.name == until:
            break
    return results


def open_inputs(stage: Stage, refs: Mapping[str, ArtifactRef], store: ArtifactStore) -> Any:
    """What a stage reads, its files verified: an instance of `stage.inputs`.

    Raises:
        DamagedFileError: an artifact is not what was published.
    """
    return stage.inputs(
        **{
            field: open_artifact(kind, refs[kind.stage], store)
            for field, kind in stage.reads.items()
        }
    )


def open_artifact(kind: type[A], ref: ArtifactRef, store: ArtifactStore) -> A:
    """One published artifact, its files verified.

    Raises:
        DamagedFileError: it is not what was published.
    """
    return kind.opened(store.path(ref), store.verify(ref))


def _ref(
    run: RunConfig, stage: Stage, refs: Mapping[str, ArtifactRef]
) -> tuple[ArtifactRef, dict[str, str], int]:
    config = run.stage(stage.name)
    missing = [name for name in stage.upstream if name not in refs]
    if missing:
        raise BadInputError(
            f"Stage {stage.name} cannot run yet.", f"It reads {', '.join(missing)}."
        )
    fingerprint = stage.fingerprint(config)
    seed = derive_seed(run.seed, stage.name)
    digest = artifact_digest(
        stage=stage.name,
        version=stage.version,
        config=config.digest_fields(),
        seed=seed,
        fingerprint=fingerprint,
        inputs={name: refs[name] for name in stage.upstream},
    )
    return ArtifactRef(kind=stage.kind, stage=stage.name, digest=digest), fingerprint, seed


def _build(
    run: RunConfig,
    stage: Stage,
    ref: ArtifactRef,
    fingerprint: dict[str, str],
    seed: int,
    inputs: tuple[Artifact, ...],
    *,
    store: ArtifactStore,
    report: Reporter,
    device: str | None,
    refs: Mapping[str, ArtifactRef],
) -> Manifest:
    import torch  # here, because planning and reusing need none

    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    progress = store.make_progress(ref, report.note)
    resumed = any(progress.iterdir())
    if resumed:
        report.note(f"{stage.name} goes on from its last checkpoint.")
    upstream = tuple(dict.fromkeys(c for artifact in inputs for c in artifact.caveats))
    machine = devices.snapshot()
    started = time.monotonic()
    seed_everything(seed)
    with store.building(ref) as out, closing(executor_for(run)) as executor:
        context = StageContext(
            out, progress, seed, torch_device, report, upstream, str(ref), executor
        )
        output = stage.run(inputs, run.stage(stage.name), context)
        # What was dropped with an interruption may be missing from the result.
        interrupts.check()
        _check_metrics(stage, output)
        caveats = list(upstream)
        if output.verdict == "fail" or (output.reasons and not stage.gate):
            caveats += [f"{stage.name}: {reason}" for reason in output.reasons]
        manifest = Manifest(
            kind=stage.kind,
            stage=stage.name,
            digest=ref.digest,
            version=stage.version,
            config=run.stage(stage.name).model_dump(mode="json"),
            digest_fields=run.stage(stage.name).digest_fields(),
            seed=seed,
            inputs={name: refs[name] for name in stage.upstream},
            fingerprint=fingerprint,
            files={},
            metrics=dict(output.metrics),
            verdict=output.verdict,
            reasons=list(output.reasons),
            caveats=caveats,
            source_digest=provenance.source_digest(stage.module),
            git_commit=provenance.git_commit(),
            packages=provenance.package_versions(),
            device=str(torch_device),
            device_name=provenance.device_name(torch_device),
            devices=machine,
            threads=torch.get_num_threads(),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=provenance.peak_memory_bytes(torch_device),
            resumed=resumed,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return store.publish(ref, out, manifest, report.alert)


def _check_metrics(stage: Stage, output: Output) -> None:
    for name, value in output.metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NumericalError(
                f"{stage.name} measured {name} = {value}.",
                "A number that is not finite is not a result.",
                "Look for NaN upstream; lower the learning rate if training diverged.",
            )
    if stage.gate != (output.verdict is not None):
        raise TypeError(f"{stage.name}: gates, and only gates, return a verdict")


def _refuse_failed_gates(run: RunConfig, stage: Stage, inputs: tuple[Artifact, ...]) -> None:
    for artifact in inputs:
        if artifact.verdict == "fail" and _on_fail(run, artifact.stage) == "stop":
            raise GateFailedError(
                f"{stage.name} refuses to run: {artifact.stage} failed.",
                "; ".join(artifact.caveats),
                f"Mend the cause, or set {artifact.stage}.on_fail: warn to go on under a caveat.",
            )


def _judge(
    run: RunConfig,
    stage: Stage,
    store: ArtifactStore,
    ref: ArtifactRef,
    manifest: Manifest,
    report: Reporter,
) -> None:
    reasons = "; ".join(manifest.reasons)
    if _on_fail(run, stage.name) == "stop":
        raise GateFailedError(
            f"{stage.name} said no: {reasons}.",
            f"The report is published at {store.path(ref)}.",
            f"Mend the cause, or set {stage.name}.on_fail: warn to go on under a caveat.",
        )
    report.note(f"{stage.name} said no ({reasons}); on_fail is warn, so the run goes on, marked.")


def _on_fail(run: RunConfig, stage_name: str) -> str:
    return str(getattr(run.stage(stage_name), "on_fail", "stop"))


def executor_for(run: RunConfig) -> Executor:
    """Who computes the shards of stages that have them."""
    if run.executor.type == "local":
        return LocalExecutor(run.executor.retries)
    from rldecoder.executors.ray_cluster import RayExecutor

    return RayExecutor(
        run.executor,
        threads=run.threads or run.executor.cpus,
        timeout_seconds=run.device_timeout_seconds,
    )


def devices_wanted(run: RunConfig, stage: Stage) -> int:
    """Accelerators of this machine that a stage holds at once, where there are any.

    0 where a cluster does all that needs one: what this process held would be missing there.
    """
    config = run.stage(stage.name)
    if run.executor.type == "ray" and (stage.in_shards or config.in_team):
        return 0
    return config.num_devices


def store_for(run: RunConfig, place: Path | str | None = None) -> ArtifactStore:
    """The store that a run's config names, unless `place` (a folder, a bucket) says otherwise."""
    return open_store(place or run.store, run.mirror, run.s3)

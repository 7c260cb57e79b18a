"""Bring the frozen model and its tokenizer into the run, and prove that they belong together.

The folder that is published is a plain Hugging Face folder; every later stage reads only that.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rldecoder.artifacts.catalogue import ModelFolder
from rldecoder.config.base import hash_json
from rldecoder.config.model import RANDOM, SyncTokenizerConfig
from rldecoder.errors import BadInputError
from rldecoder.lm import specs, tokenizer_parity
from rldecoder.lm.bos_proof import measure_bos
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.loading import read_config
from rldecoder.lm.model_sources import TOKENIZER_FILES, copy_model_files, fetch, locate
from rldecoder.lm.placement import count_parameters
from rldecoder.lm.random_model import make_random_model
from rldecoder.lm.registry import ModelChoice, choose_model
from rldecoder.lm.text_part import text_part
from rldecoder.lm.text_tokens import set_bos
from rldecoder.precision import fast_dtype
from rldecoder.reporting import Bar
from rldecoder.seeds import seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import Nothing


def run(inputs: Nothing, config: SyncTokenizerConfig, ctx: StageContext) -> Output:
    """Publish the model's folder, and what it and its tokenizer are known by."""
    seed_everything(ctx.seed)
    folder = ModelFolder.model.path(ctx.out)
    with ctx.report.track("model", 4, unit="steps") as bar:
        choice, source = _bring_model(config, folder, ctx, bar)

        # Hashes first: a damaged file is named as such, whatever loading would make of it.
        known = choice.spec.file_sha256 if choice.spec else {}
        weights = tokenizer_parity.hash_files(sorted(folder.glob("model*.safetensors")), known)
        dtype = fast_dtype(config.compute_dtype, ctx.device)
        if config.compute_dtype == "bfloat16" and dtype != torch.bfloat16:
            ctx.report.note(
                "The model runs in float32, with which this CPU is faster than with bfloat16."
            )
        lm = FrozenLM.load(folder, device=ctx.device, dtype=dtype, loading=config.loading)
        parameters = count_parameters(lm.model)
        constants = specs.read_constants(lm.model.config, parameters, lm.context_length)
        if choice.spec is not None:
            specs.check_constants(choice.spec, constants, str(folder))
        _complete_folder(lm)
        bar.advance(note="loaded")

        # Only now are all of the tokenizer's files there.
        tokenizer_files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        hashes = tokenizer_parity.TokenizerHashes(
            files=tokenizer_parity.hash_files(tokenizer_files, known),
            vocabulary_sha256=tokenizer_parity.vocabulary_sha256(lm.tokenizer),
        )
        if choice.spec is not None:
            pinned = choice.spec.vocabulary_sha256
            tokenizer_parity.require_vocabulary(hashes.vocabulary_sha256, pinned, choice.name)
        parity = tokenizer_parity.check_parity(lm, config.extra_probes)
        tokenizer_parity.require_parity(
            parity, choice.name, trained=choice.spec is not None, lossy=config.allow_lossy_tokenizer
        )
        set_bos(lm.tokenizer, config.bos)
        bos = measure_bos(lm, config.bos)
        bar.advance(note="tokenizer proved")
    for remark in parity.remarks:
        ctx.report.note(f"{choice.name}: {remark}")
    if bos.warning is not None and parity.reads_english:
        ctx.report.note(f"{choice.name}: {bos.warning}")

    record = _model_record(
        choice, constants, source, {name: file.sha256 for name, file in weights.items()}, config
    )
    ModelFolder.record.save(ctx.out, record)
    ModelFolder.parity.save(ctx.out, parity)
    bos.save(ModelFolder.bos.path(ctx.out))
    ModelFolder.hashes.save(ctx.out, hashes)
    page = render_hashes_page(choice.name, hashes, parity)
    ModelFolder.hashes_page.path(ctx.out).write_text(page, encoding="utf-8")
    return Output(record.headline | parity.headline | bos.headline)


def _bring_model(
    config: SyncTokenizerConfig, folder: Path, ctx: StageContext, bar: Bar
) -> tuple[ModelChoice, dict[str, str]]:
    """Fill `folder` with the model's files; which model, and what its source is known by."""
    if config.model == RANDOM:
        make_random_model(folder, seed=ctx.seed, **config.random_model.model_dump())
        bar.advance(2, note="made")
        return ModelChoice(RANDOM, None, ()), {"kind": RANDOM}
    choice = choose_model(
        config.model, path=config.path, repo=config.repo, revision=config.revision
    )
    located = locate(choice.sources)
    place = fetch(located, ctx.report.note)
    bar.advance(note=f"found in {located.description}")
    _check_config(choice, place)
    copy_model_files(place, folder)
    bar.advance(note="copied")
    return choice, {"kind": located.source.kind, **located.identity}


def _check_config(choice: ModelChoice, folder: Path) -> None:
    """Compare config.json with the spec before gigabytes are copied."""
    try:
        config = text_part(read_config(folder)).config
    except (OSError, ValueError, KeyError) as error:
        raise BadInputError(
            f"The config of the model at {folder} cannot be read.",
            (str(error).strip() or type(error).__name__).splitlines()[0],
            "It must be an architecture that `transformers` itself has; code that comes with a "
            "model is never run.",
        ) from error
    if choice.spec is not None:
        claimed = choice.spec.architecture.parameters
        specs.check_constants(choice.spec, specs.read_constants(config, claimed), str(folder))


def _complete_folder(lm: FrozenLM) -> None:
    """Add what older model folders lack: a fast tokenizer's file and generation settings."""
    if not (lm.folder / "tokenizer.json").is_file():
        lm.tokenizer.backend_tokenizer.save(str(lm.folder / "tokenizer.json"))
    if not (lm.folder / "generation_config.json").is_file():
        lm.model.generation_config.save_pretrained(lm.folder)


def _model_record(
    choice: ModelChoice,
    constants: specs.ArchitectureConstants,
    source: dict[str, str],
    weights: dict[str, str],
    config: SyncTokenizerConfig,
) -> specs.ModelRecord:
    spec = choice.spec
    unknown = "none: random weights" if choice.name == RANDOM else "unknown: read the model's card"
    return specs.ModelRecord(
        name=choice.name,
        title=spec.title if spec else choice.name,
        licence=spec.licence if spec else unknown,
        hook_layer=spec.hook_layer if spec else None,
        compute_dtype=config.compute_dtype,
        source=source,
        weights_sha256=next(iter(weights.values())) if len(weights) == 1 else hash_json(weights),
        weight_files=weights,
        bos=config.bos,
        loading=config.loading,
        **constants.model_dump(),
    )


def render_hashes_page(
    name: str, hashes: tokenizer_parity.TokenizerHashes, parity: tokenizer_parity.ParityRecord
) -> str:
    """The page for people (the quickstart model's is kept in docs/)."""
    lines = [
        "# Tokenizer hashes",
        "",
        "Written by the `sync_tokenizer` stage; do not edit.",
        "",
        f"## {name}",
        "",
        "| file | bytes | SHA-256 | compared with |",
        "|---|---:|---|---|",
    ]
    lines += [
        f"| {file} | {known.size_bytes:,} | `{known.sha256}` | {known.status} |"
        for file, known in hashes.files.items()
    ]

    # The table is what counts: its file changes with the library that writes it.
    lines += [
        "",
        f"Token table: `{hashes.vocabulary_sha256}`",
        "(SHA-256 of the canonical JSON of token -> id, whatever file and library it came from).",
        "",
        "## Proof that it belongs to the model",
        "",
        "| check | found |",
        "|---|---|",
        f"| tokens, embedding rows | {parity.tokenizer_size:,}, {parity.embedding_rows:,} |",
        f"| highest token id | {parity.highest_token_id:,} |",
        f"| special tokens | {json.dumps(parity.special_tokens)} |",
        f"| special tokens in the model's config | {json.dumps(parity.model_special_tokens)} |",
        f"| probe texts returned unchanged | {sum(p.lossless for p in parity.probes)} of "
        f"{len(parity.probes)} |",
        f"| cross-entropy on plain English | {parity.english_cross_entropy:.3f} nats/token "
        f"(guessing: {parity.uniform_cross_entropy:.3f}) |",
        "",
        "## Published hashes",
        "",
        "A file of these names must match, or the run stops.",
        "",
        "| model | file | SHA-256 |",
        "|---|---|---|",
    ]

    for spec in map(specs.load_model_spec, specs.list_model_specs()):
        lines += [
            f"| {spec.name} | {file} | `{digest}` |"
            for file, digest in sorted(spec.file_sha256.items())
        ]
        if spec.vocabulary_sha256:
            lines.append(f"| {spec.name} | token table | `{spec.vocabulary_sha256}` |")
    return "\n".join(lines) + "\n"

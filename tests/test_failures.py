"""What libraries and the system raise, as errors of our own; a fault of the program is none."""

from __future__ import annotations

import errno
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from rldecoder.errors import (
    BadInputError,
    DamagedFileError,
    GateFailedError,
    NoResourceError,
    RlDecoderError,
    UnexpectedError,
)
from rldecoder.failures import foreseen, translated, unexpected


def raised_by(act: Callable[[], object]) -> BaseException:
    """What a library really raises."""
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOSPC, "No space left", "/s/a"), NoResourceError, "disk is full.*/s/a"),
        (OSError(errno.EDQUOT, "Quota"), NoResourceError, "disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/s"), BadInputError, "not permit.*/s"),
        (PermissionError(errno.EACCES, "denied", "/s"), BadInputError, "not permit"),
        (IsADirectoryError(errno.EISDIR, "is a folder", "/x"), BadInputError, "/x"),
        (FileNotFoundError(errno.ENOENT, "none", "/x"), BadInputError, "/x"),
        (OSError(errno.ENAMETOOLONG, "long", "x"), BadInputError, "cannot be used"),
        (OSError(errno.EMFILE, "many"), NoResourceError, "ulimit"),
        (OSError(errno.EIO, "I/O"), NoResourceError, "refused"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), NoResourceError, "refused"),
        (OSError("from a library, without a number"), NoResourceError, "from a library"),
        (MemoryError(), NoResourceError, "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), NoResourceError, "memory"),
        (RuntimeError("can't start new thread"), NoResourceError, "memory"),
        (raised_by(lambda: np.zeros(1 << 58)), NoResourceError, "memory"),
        (raised_by(lambda: torch.zeros(1 << 58)), NoResourceError, "memory"),
        (raised_by(lambda: b'\xff'.decode()), BadInputError, "position 0"),
        (raised_by(lambda: 'a\udcff'.encode()), BadInputError, "position 1"),
        (raised_by(lambda: json.loads(DEEP)), BadInputError, "too deep"),
        (raised_by(lambda: yaml.safe_load(DEEP)), BadInputError, "too deep"),
        (raised_by(lambda: json.loads('{')), DamagedFileError, "damaged"),
        (raised_by(lambda: zlib.decompress(b'no')), DamagedFileError, "damaged"),
        (raised_by(lambda: pa.ipc.open_file(pa.py_buffer(b'no'))), DamagedFileError, "damaged"),
        (raised_by(lambda: load(b'no')), DamagedFileError, "damaged"),
        (raised_by(lambda: pa.array([b'\xff']).cast(pa.string(), safe=False).to_pylist()),
         BadInputError, "Unicode"),
        (EOFError("Compressed file ended"), DamagedFileError, "ended"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_what_can_be_foreseen(error: BaseException, kind: type, text: str) -> None:
    known = foreseen(error, "train_sae")
    assert type(known) is kind
    assert "in train_sae" in str(known)
    assert re.search(text, str(known))


def test_errors_of_rust_carry_their_number_in_the_text(tmp_path: Path) -> None:
    error = raised_by(lambda: save_file({"a": torch.zeros(9)}, tmp_path / "absent" / "file"))
    assert isinstance(foreseen(error), BadInputError)
    full = SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    assert isinstance(foreseen(full), NoResourceError)
    assert isinstance(foreseen(Exception("disk (os error 30)")), BadInputError)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), ValueError("v"), AssertionError(), RecursionError("our own"), AttributeError()],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_the_program_are_not(error: Exception, tmp_path: Path) -> None:
    assert foreseen(error) is None
    with pytest.raises(type(error)) as caught, translated("train_sae"):
        raise error
    assert caught.value.__notes__ == ["This happened in train_sae."]


def test_our_own_pass_as_they_are() -> None:
    error = GateFailedError("no")
    with pytest.raises(GateFailedError) as caught, translated("gate_sae"):
        raise error
    assert caught.value is error


def test_the_traceback_of_a_fault_goes_to_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error = raised_by(lambda: {}["it \x1b[2J \udcff s3://me:secret@host/" + "x" * 999])
    told = unexpected(error)
    (file,) = tmp_path.iterdir()
    assert (type(told), told.exit_code) == (UnexpectedError, 70)
    assert str(file) in told.why
    assert "report" in told.mend
    assert "Traceback" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "\x1b" not in told.what
    assert "secret" not in told.what
    assert len(told.what) < 500


def test_without_a_place_for_the_file_the_traceback_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert "Traceback" in unexpected(raised_by(lambda: 1 / 0)).why


def test_a_fault_of_a_stage_process_keeps_its_words() -> None:
    error: RlDecoderError = UnexpectedError("ingest failed with KeyError: x.")
    error.add_note("Traceback of the child")
    assert unexpected(error).what == "ingest failed with KeyError: x."

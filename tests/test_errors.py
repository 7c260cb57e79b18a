"""Errors carry their three sentences and their exit code, also across processes."""

from __future__ import annotations

import copy

from rldecoder.errors import (
    BadInputError,
    DamagedFileError,
    GateFailedError,
    InterruptedRunError,
    NoResourceError,
    RlDecoderError,
)


def test_three_sentences_and_exit_codes() -> None:
    error = BadInputError("What.", "Why.", "Mend.")
    assert str(error) == "What. Why. Mend."
    assert str(DamagedFileError("What.")) == "What."
    codes = [e("x").exit_code for e in (BadInputError, GateFailedError, InterruptedRunError)]
    assert codes == [2, 1, 3]


def test_errors_survive_a_copy() -> None:
    error = copy.copy(GateFailedError("What.", "Why.", "Mend."))
    assert isinstance(error, RlDecoderError)
    assert (error.what, error.why, error.mend) == ("What.", "Why.", "Mend.")


def test_urls_in_errors_have_no_passwords() -> None:
    url = "ftp://user:hunter2@host/x"
    error = NoResourceError(f"{url} is away.", f"cannot open '{url}'", f"mend {url}")
    again = copy.copy(error)
    for text in (str(error), error.what, error.why, error.mend, repr(error), str(again)):
        assert "hunter2" not in text
    assert "ftp://***@host/x is away." in str(error)

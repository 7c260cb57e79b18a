"""An error of another process, told in JSON and raised here with its own class: no pickle."""

from __future__ import annotations

import traceback

from pydantic import BaseModel, ConfigDict

from rldecoder import errors
from rldecoder.errors import RlDecoderError
from rldecoder.failures import foreseen, shown
from rldecoder.urls import without_credentials


class Failure(BaseModel):
    """Why work in another process failed."""

    model_config = ConfigDict(frozen=True)

    type: str
    """Class of the exception."""
    parts: tuple[str, str, str] | None = None
    """What, why and how to mend, of one of our own errors."""
    message: str = ""
    """In one line."""
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """An error, or what `foreseen` makes of it; credentials in URLs are left out."""
        known = foreseen(error)
        told = known or error
        return cls(
            type=type(told).__name__,
            parts=None if known is None else (known.what, known.why, known.mend),
            message=without_credentials(shown(told)),
            traceback=without_credentials("".join(traceback.format_exception(error))),
        )

    def known(self) -> RlDecoderError | None:
        """The error with its own class, where that is one of ours."""
        kind = getattr(errors, self.type, None)
        if self.parts and isinstance(kind, type) and issubclass(kind, RlDecoderError):
            return kind(*self.parts)
        return None

"""The few requests that `make ui` sends to its own server, as a program that knows the password."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import httpx

from flows.password import authorization
from rldecoder.errors import NoResourceError

_SECONDS = 60
_TAIL_CHARACTERS = 1500


class Api:
    """A Prefect server's HTTP API, with password and CSRF token.

    Args:
        url: ends in `/api`.
    """

    def __init__(self, url: str, password: str) -> None:
        self.root = url.removesuffix("/api")
        self._client = httpx.Client(
            base_url=url,
            timeout=_SECONDS,
            trust_env=False,  # no proxy stands between this machine and itself
            headers={"authorization": authorization(password)},
        )
        client = str(uuid4())
        answer = self._client.get("/csrf-token", params={"client": client})
        if answer.status_code == httpx.codes.OK:  # else it asks for none
            token = answer.json()["token"]
            own = {"prefect-csrf-client": client, "prefect-csrf-token": token}
            self._client.headers.update(own)

    def send(self, method: str, path: str, body: Any, *, also: tuple[int, ...] = ()) -> Any:
        """Send JSON, and return what is answered.

        Args:
            path: below the API's address, or an absolute URL of the same server.
            also: status codes beside 2xx that are no failure.

        Raises:
            NoResourceError: the server refuses.
        """
        deadline = time.monotonic() + _SECONDS
        while True:
            answer = self._client.request(method, path, json=body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                break
            time.sleep(0.5)  # the database is locked by one of the server's own services
        if not answer.is_success and answer.status_code not in also:
            said = answer.text[:_TAIL_CHARACTERS]
            raise NoResourceError(
                f"The Prefect server refused {method} {path} ({answer.status_code}).", said
            )
        return answer.json() if answer.content else None

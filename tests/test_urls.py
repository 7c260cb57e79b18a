"""Credentials of URLs stay out of every text."""

from __future__ import annotations

import pytest

from rldecoder.urls import without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://user:hunter2@host:9/y", "ftp://***@host:9/y"),
        ("https://host/c?sig=hunter2&x=1", "https://host/c?***"),
        ("https://host/c#hunter2", "https://host/c#***"),
        ("simplecache::ftp://u:hunter2@h/x", "simplecache::ftp://***@h/x"),
        ("zip://a.zip::ftp://u:hunter2@h/x", "zip://a.zip::ftp://***@h/x"),
        ("sftp://u:hun/ter2@h/x", "sftp://***@h/x"),
        ("sftp://u:p@hunter2@h/x", "sftp://***@h/x"),
        ("no 'http://u:hunter2@h/a' now", "no 'http://***@h/a' now"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("http://localhost:80/a", "http://localhost:80/a"),
        ("file:///mnt/my share", "file:///mnt/my share"),
        ("no URL: a@b", "no URL: a@b"),
    ],
)
def test_what_is_left_of_a_url(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown


def test_a_known_url_is_found_whatever_its_password_holds() -> None:
    url = "ftp://user:it's <hunter2>@host/y"
    text = f"cannot open {url}!"
    assert without_credentials(text, url) == "cannot open ftp://***@host/y!"

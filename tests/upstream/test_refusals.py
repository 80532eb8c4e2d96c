"""Refusals of a server, and those of something before it; tests/cache/test_walls has what follows from that."""

from __future__ import annotations

import pytest

from dockerproxy.http.headers import Headers
from dockerproxy.upstream.refusals import is_own_refusal, is_page

PAGE = b"<html>"
HTML = {"Content-Type": "text/html"}
CHALLENGE = {"WWW-Authenticate": 'Basic realm="x"'}
API = {"Docker-Distribution-Api-Version": "registry/2.0"}


@pytest.mark.parametrize(
    ("status", "fields", "content"),
    [
        (403, {}, b""),
        (404, {}, b""),
        (404, {"Content-Type": "text/plain"}, b"404 page not found\n"),  # Go's http.NotFound
        (403, {"Content-Type": "application/octet-stream"}, b""),
        (403, HTML, b'{"errors":[]}'),
        (401, {}, b'\n {"details": "incorrect username or password"}'),  # auth.docker.io
        (401, CHALLENGE, b""),
        (401, HTML | CHALLENGE, PAGE),
        (403, HTML | API, PAGE),
        (451, API, b""),
    ],
)
def test_own_words(status: int, fields: dict[str, str], content: bytes) -> None:
    assert is_own_refusal(status, Headers(fields.items()), content)


@pytest.mark.parametrize(
    ("status", "fields", "content"),
    [
        (403, HTML, PAGE),
        (404, HTML, b""),
        (403, {"Content-Type": "Application/XML; charset=x"}, b""),
        (403, {"Content-Type": "application/json"}, b"\xef\xbb\xbf\r\n <!DOCTYPE html>"),
        (401, {}, b""),
        (401, {"WWW-Authenticate": ""}, b""),
        (407, {"Proxy-Authenticate": "Basic"}, b""),
        (451, {}, b"blocked by order of a court"),
        (403, {"Content-Type": "text/plain"}, b"error code: 1020"),
        (403, {"CF-Mitigated": "challenge"}, b""),
        (403, {"X-Squid-Error": "ERR_ACCESS_DENIED 0"}, b""),
    ],
)
def test_words_of_others(status: int, fields: dict[str, str], content: bytes) -> None:
    assert not is_own_refusal(status, Headers(fields.items()), content)


@pytest.mark.parametrize(("media_type", "page"), [("Text/HTML;x=y", True), ("text/plain", False), (None, False)])
def test_pages(media_type: str | None, page: bool) -> None:
    assert is_page(Headers([] if media_type is None else [("Content-Type", media_type)])) == page

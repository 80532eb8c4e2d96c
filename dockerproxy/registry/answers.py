"""Errors as the distribution API has them: the one place that renders a `RegistryError`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from dockerproxy.errors import RegistryError, UpstreamRefused
from dockerproxy.http.headers import HOP_BY_HOP
from dockerproxy.http.request import Request

API_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")

_NOT_RELAYED = HOP_BY_HOP | {"content-length", "date", "server", "set-cookie", "strict-transport-security"}


def answer_error(request: Request, error: RegistryError) -> None:
    """Answer with `error`; upstream's own refusal in upstream's own words."""
    if isinstance(error, UpstreamRefused):
        relayed = [(name, value) for name, value in error.headers if name not in _NOT_RELAYED]
        _answer(request, error.status, relayed, error.content)
        return
    body = json.dumps({"errors": [{"code": error.code, "message": error.message}]}).encode()
    _answer(request, error.status, [("Content-Type", "application/json"), API_VERSION, *error.headers], body)


def _answer(request: Request, status: int, fields: Iterable[tuple[str, str]], body: bytes) -> None:
    request.answer(status, [*fields, ("X-Cache", request.verdict)], body)

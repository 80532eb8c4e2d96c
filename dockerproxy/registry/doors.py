"""The two ways to a registry elsewhere: reached under its own name (interception), and as its mirror."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from dockerproxy.errors import NameUnknown, RegistryError, Unsupported
from dockerproxy.http.message import origin_form
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host, Registry
from dockerproxy.oci.routes import Kind, Target, route, take_parameter
from dockerproxy.registry.answers import API_VERSION, answer_error
from dockerproxy.registry.face import Face
from dockerproxy.registry.mirrored import READING, Mirrored, Remote, check_push, pass_on

_MAX_FORM = 64 * 1024

Open = Callable[[Registry, str | None], Remote]
"""Returns a registry for a client that shows an Authorization, or none."""


class Realms(Protocol):
    """Answers for the token servers of the registries."""

    def served_at(self, host: Registry, path: str) -> Registry | None:
        """Return the registry whose tokens are given out at `path` of `host`, if any."""

    async def token(self, registry: Registry, query: str, authorization: str | None, form: bytes | None) -> bytes:
        """Return the JSON that a client gets."""


class Intercepted:
    """Answers for registries under their own names, in their place."""

    def __init__(self, face: Face, open_remote: Open, realms: Realms, *, allow_push: bool) -> None:
        self._face = face
        self._open = open_remote
        self._realms = realms
        self._allow_push = allow_push

    async def answer(self, registry: Registry, request: Request) -> None:
        """Answer a request that the client means for `registry`."""
        request.host = str(registry)
        remote = self._open(registry, request.headers.get("authorization"))
        try:
            await self._route(registry, request, remote)
        except RegistryError as error:
            refuse(request, error, remote.challenge(error, secure=request.secure) if error.status == 401 else [])

    def _route(self, registry: Registry, request: Request, remote: Remote) -> Awaitable[None]:
        """Return what answers `request`: no coroutine around it, each of which takes memory with a slow client."""
        _check_path(request)
        target = _target(request.path)
        if target is not None:
            return self._face.answer(request, target, Mirrored(remote, self._allow_push))
        served = self._realms.served_at(registry, request.path)
        if served is not None and request.method in ("GET", "POST"):
            return self._token(served, request)
        if request.method not in (*READING, "OPTIONS"):
            check_push(request, self._allow_push)
        return pass_on(request, remote, None)

    async def _token(self, registry: Registry, request: Request) -> None:
        request.cache_status = "PASS"
        form = await request.read_all(_MAX_FORM) if request.method == "POST" else None
        content = await self._realms.token(registry, request.query, request.headers.get("authorization"), form)
        fields = [
            ("Content-Type", "application/json"),
            ("Cache-Control", "no-store"),
            ("X-Cache", request.cache_status),
        ]
        request.respond(200, fields, content)


class Mirror:
    """Answers as a mirror: `?ns=HOST` names one of `registries`, and without it `hub` is meant.

    A mirror's client brings no login of upstream's, so what it shows goes nowhere, and our own or none speaks for it.
    """

    def __init__(self, face: Face, open_remote: Open, registries: Mapping[Host, Registry], hub: Registry) -> None:
        self._face = face
        self._open = open_remote
        self._registries = registries
        self._hub = hub

    async def answer(self, request: Request) -> None:
        """Answer a request to `/v2/`."""
        try:
            await self._answer(request)
        except RegistryError as error:
            # Without a challenge: a login for the registry that is mirrored is nothing to show to us.
            refuse(request, error, [])

    async def _answer(self, request: Request) -> None:
        _check_path(request)
        target = route(request.path)
        namespace, request.query = take_parameter(request.query, "ns")
        registry = self._hub if namespace is None else self._registries.get(Host.parse(namespace))
        if registry is None:
            raise NameUnknown(f"{namespace!r} is not mirrored here: its administrator can add it to REGISTRIES")
        request.host = str(registry)
        if request.method not in READING:
            sentence = "a mirror is pulled from only: push to the registry itself"
            raise Unsupported(sentence, headers=[("Allow", ", ".join(READING))])
        if target.kind is Kind.BASE:
            request.respond(200, [("Content-Type", "application/json"), API_VERSION], b"{}")
            return
        await self._face.answer(request, target, Mirrored(self._open(registry, None), False, namespace))


def refuse(request: Request, error: RegistryError, challenge: list[tuple[str, str]]) -> None:
    """Answer with `error` under `challenge`; break off where an answer has begun, so that nobody takes it for whole."""
    if request.started:
        request.abort()
    else:
        answer_error(request, error, challenge)


def _check_path(request: Request) -> None:
    """Refuse what is no path: behind a registry's origin, `.example.com/` would make another server's URL of it."""
    path, request.path = request.path, ""  # it may hold a login, which is nothing for the log
    request.path = origin_form(path)


def _target(path: str) -> Target | None:
    """Return what a path of the API means; None for one that is none of it, and is upstream's business."""
    try:
        return route(path)
    except NameUnknown:
        return None

"""Who may read the hosted registry and who may write to it; and how clients are told to say who they are."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Protocol

from dockerproxy.errors import NameInvalid, Unauthorized, Unsupported
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host
from dockerproxy.oci.routes import Kind, Target
from dockerproxy.registry.htpasswd import BasicCredentials, HtpasswdFile, parse_basic
from dockerproxy.registry.responses import FieldList

HOSTED_TOKEN_PATH = "/v2/token"
"""Where clients of a registry that lets everyone read get their tokens."""

_TOKEN_LIFETIME = 3600  # seconds for which a token holds


class AccessControl(Protocol):
    """Decides about the requests of one registry."""

    async def check(self, request: Request, target: Target) -> None:
        """Return where the client may do what it asks for; raise `Unauthorized`."""

    def challenge(self, request: Request, target: Target | None) -> FieldList:
        """Return what a client is told that may not; `target` is None where its path means nothing."""

    async def handle_token(self, request: Request) -> bool:
        """Answer a request to `TOKEN_PATH`, if there is such a thing here; say whether. Raise `Unauthorized`."""


class AllowAll:
    """No users: everyone may do everything."""

    async def check(self, request: Request, target: Target) -> None:
        """Let it pass."""

    def challenge(self, request: Request, target: Target | None) -> FieldList:
        return []

    async def handle_token(self, request: Request) -> bool:
        return False


class RequireLogin:
    """A login for everything."""

    def __init__(self, htpasswd: HtpasswdFile, realm: str) -> None:
        self._htpasswd = htpasswd
        self._realm = realm

    async def check(self, request: Request, target: Target) -> None:
        await _authenticate(self._htpasswd, request)

    def challenge(self, request: Request, target: Target | None) -> FieldList:
        return [_basic_challenge(self._realm)]

    async def handle_token(self, request: Request) -> bool:
        return False


class AnonymousPull:
    """Everyone may read, a login is for the rest (ANONYMOUS_PULL).

    With Basic alone dockerd cannot do both: it asks `/v2/` once, without a login. Where that answers 200 it never
    shows one, and where that asks for Basic it pulls nothing without one. So it is told to fetch a token, which it does
    with its login where it has one; each of our own making is for a user, or for nobody. Basic is taken as well.
    """

    def __init__(self, htpasswd: HtpasswdFile, realm: str, secret: bytes, clock: Callable[[], float]) -> None:
        self._htpasswd = htpasswd
        self._realm = realm
        self._secret = secret
        self._clock = clock

    async def check(self, request: Request, target: Target) -> None:
        scheme, _, token = (request.headers.get("authorization") or "").partition(" ")
        has_authorization = bool(scheme)
        if scheme.lower() == "bearer":
            user = self._verify_token(token.strip())
            if user and self._htpasswd.has_user(user):
                return
            if user is None:
                raise Unauthorized("the token has ended, or is none of this registry's")
        elif has_authorization:
            await _authenticate(self._htpasswd, request)
            return
        is_read = request.method in ("GET", "HEAD") and target.kind is not Kind.UPLOAD
        if not is_read or (target.kind is Kind.BASE and not has_authorization):
            raise Unauthorized("a login is needed to write to this registry")

    def challenge(self, request: Request, target: Target | None) -> FieldList:
        scheme = "https" if request.secure else "http"
        value = f'Bearer realm="{scheme}://{self._host(request)}{HOSTED_TOKEN_PATH}",service="{self._realm}"'
        if target is not None and target.name is not None:
            actions = "pull" if request.method in ("GET", "HEAD") else "pull,push"
            value += f',scope="repository:{target.name}:{actions}"'
        return [("WWW-Authenticate", value)]

    async def handle_token(self, request: Request) -> bool:
        if request.method != "GET":
            raise Unsupported("tokens are given out by GET only", headers=[("Allow", "GET")])
        user = ""
        if "authorization" in request.headers:
            try:
                user = await _authenticate(self._htpasswd, request)
            except Unauthorized as error:
                raise Unauthorized(error.message, headers=[_basic_challenge(self._realm)]) from None
        now = self._clock()
        token = self._issue_token(user, now)
        document = {
            "token": token,
            "access_token": token,
            "expires_in": _TOKEN_LIFETIME,
            "issued_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        }
        fields = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
        request.respond(200, fields, json.dumps(document).encode())
        return True

    def _host(self, request: Request) -> str:
        """Return where the client reaches us, as it says; it goes there itself, and nobody else does."""
        try:
            return str(Host.parse(request.headers.get("host") or "", 443 if request.secure else 80).authority)
        except NameInvalid:
            return self._realm

    def _issue_token(self, user: str, now: float) -> str:
        payload = f"{int(now) + _TOKEN_LIFETIME}\n{user}".encode()
        return urlsafe_b64encode(self._sign(payload) + payload).decode("ascii")

    def _verify_token(self, token: str) -> str | None:
        """Return the user whom a token is for, ``""`` for nobody; None where it is not, or no longer, good."""
        try:
            data = urlsafe_b64decode(token)
        except ValueError:
            return None
        signature, payload = data[:32], data[32:]
        if not hmac.compare_digest(signature, self._sign(payload)):
            return None
        expiry, _, user = payload.decode().partition("\n")
        return user if self._clock() < int(expiry) else None

    def _sign(self, payload: bytes) -> bytes:
        return hmac.new(self._secret, b"hosted\n" + payload, hashlib.sha256).digest()


async def _authenticate(htpasswd: HtpasswdFile, request: Request) -> str:
    """Return the user that `request` shows a right login of; raise `Unauthorized`."""
    authorization = request.headers.get("authorization")
    if authorization is None:
        raise Unauthorized("a login is needed")
    credentials = parse_basic(authorization)
    if credentials == BasicCredentials("", b""):  # what podman and skopeo show where they have none
        raise Unauthorized("a login is needed")
    if credentials is None or not await htpasswd.check_password(credentials):
        raise Unauthorized("the user or the password is wrong")
    return credentials.user


def _basic_challenge(realm: str) -> tuple[str, str]:
    return "WWW-Authenticate", f'Basic realm="{realm}"'

"""Access control of the hosted registry: permissions, and the challenges for clients without a login."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from typing import Protocol

from dockerproxy.errors import NameInvalid, Unauthorized, Unsupported
from dockerproxy.http.message import READ_METHODS
from dockerproxy.http.request import Request
from dockerproxy.oci.credentials import BasicCredentials, is_empty_login
from dockerproxy.oci.names import Host, Registry
from dockerproxy.oci.routes import Kind, Target
from dockerproxy.registry.htpasswd import HtpasswdFile
from dockerproxy.registry.principal import Principal
from dockerproxy.registry.responses import FieldList

HOSTED_TOKEN_PATH = "/v2/token"
"""Clients of a registry with ANONYMOUS_PULL get their tokens at this path."""

_TOKEN_LIFETIME = 3600  # seconds


class AccessControl(Protocol):
    """Decides about the requests of one registry."""

    @property
    def reading_needs_login(self) -> bool:
        """Whether only users may read."""

    async def check(self, request: Request, target: Target) -> Principal:
        """Return who makes this request. Raise `Unauthorized`, with a challenge, if the client may not make it."""

    async def handle_token(self, request: Request) -> bool:
        """Respond to a request to `HOSTED_TOKEN_PATH` and return True. Return False if this registry has no tokens.

        Raise `Unauthorized`.
        """


class AllowAll:
    """No users: every request is allowed."""

    reading_needs_login = False

    async def check(self, request: Request, target: Target) -> Principal:
        return Principal.of(request, None)

    async def handle_token(self, request: Request) -> bool:
        return False


class RequireLogin:
    """Every request needs a login."""

    reading_needs_login = True

    def __init__(self, htpasswd: HtpasswdFile, realm: str) -> None:
        self._htpasswd = htpasswd
        self._challenge = [_basic_challenge(realm)]

    async def check(self, request: Request, target: Target) -> Principal:
        return Principal.of(request, await _authenticate(self._htpasswd, request, self._challenge))

    async def handle_token(self, request: Request) -> bool:
        return False


class AnonymousPull:
    """Reading needs no login; everything else does (ANONYMOUS_PULL).

    With Basic alone, dockerd cannot do both. It requests `/v2/` once, without a login. If the response is 200, it never
    sends its login; if the response asks for Basic, it pulls nothing without one. The challenge therefore asks for a
    token, which dockerd fetches with its login if it has one. All tokens are our own; each is for one user, or for an
    anonymous client. A user's token ends with the password by which it was fetched. Basic is accepted as well.

    The challenge leads a client to `public_url` (REGISTRY_URL) if that is set, and otherwise to the address that it has
    used. Clients that reach one of `own_names` over TLS stay there, because this name may be the only one they know.
    """

    reading_needs_login = False

    def __init__(
        self,
        htpasswd: HtpasswdFile,
        own_names: Sequence[str],
        secret: bytes,
        clock: Callable[[], float],
        public_url: Registry | None = None,
    ) -> None:
        self._htpasswd = htpasswd
        self._own_names = own_names
        self._realm = own_names[0]
        self._secret = secret
        self._clock = clock
        self._public_url = public_url

    async def check(self, request: Request, target: Target) -> Principal:
        scheme, _, token = (_login(request) or "").partition(" ")
        has_authorization = bool(scheme)
        if scheme.lower() == "bearer":
            user = self._verify_token(token.strip())
            if user:
                return Principal.of(request, user)
            if user is None:
                message = "the token has expired with its time or its password, or was not issued by this registry"
                raise Unauthorized(message, headers=self._challenge(request, target))
        elif has_authorization:
            challenge = self._challenge(request, target)
            return Principal.of(request, await _authenticate(self._htpasswd, request, challenge))
        is_read = request.method in READ_METHODS and target.kind is not Kind.UPLOAD
        if not is_read or (target.kind is Kind.BASE and not has_authorization):
            message = "authentication required to write to this registry"
            raise Unauthorized(message, headers=self._challenge(request, target))
        return Principal.of(request, None)

    def _challenge(self, request: Request, target: Target) -> FieldList:
        value = f'Bearer realm="{self._base_url(request)}{HOSTED_TOKEN_PATH}",service="{self._realm}"'
        if target.name:
            actions = "pull" if request.method in READ_METHODS else "pull,push"
            value += f',scope="repository:{target.name}:{actions}"'
        return [("WWW-Authenticate", value)]

    async def handle_token(self, request: Request) -> bool:
        if request.method != "GET":
            raise Unsupported("tokens are requested with GET", headers=[("Allow", "GET")])
        user = ""
        if _login(request) is not None:
            user = await _authenticate(self._htpasswd, request, [_basic_challenge(self._realm)])
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

    def _base_url(self, request: Request) -> str:
        """Return the URL at which the client gets its token. Only this client uses the Host that it has sent."""
        scheme, default_port = ("https", 443) if request.secure else ("http", 80)
        try:
            host = Host.parse(request.host or request.headers.get("host") or "", default_port)
        except NameInvalid:
            host = Host(self._realm, default_port)
        if self._public_url is not None and not (request.secure and host.name in self._own_names):
            return self._public_url.origin
        return Registry(host, scheme).origin

    def _issue_token(self, user: str, now: float) -> str:
        payload = f"{int(now) + _TOKEN_LIFETIME}\n{user}".encode()
        return urlsafe_b64encode(self._sign(payload, user) + payload).decode("ascii")

    def _verify_token(self, token: str) -> str | None:
        """Return the user of a token, ``""`` for an anonymous client. Return None if it is invalid or has ended."""
        try:
            data = urlsafe_b64decode(token)
            signature, payload = data[:32], data[32:]
            expiry, _, user = payload.decode().partition("\n")
        except ValueError:
            return None
        if not hmac.compare_digest(signature, self._sign(payload, user)):
            return None
        return user if self._clock() < int(expiry) else None

    def _sign(self, payload: bytes, user: str) -> bytes:
        """Return the signature of a token, which changes with the user's line in the htpasswd file."""
        password_hash = self._htpasswd.password_hash(user) or b""
        return hmac.new(self._secret, b"hosted\n" + payload + b"\n" + password_hash, hashlib.sha256).digest()


async def _authenticate(htpasswd: HtpasswdFile, request: Request, challenge: FieldList) -> str:
    """Return the user name if `request` has a correct login.

    Raise `Unauthorized` with `challenge` otherwise, or `TooManyRequests`.
    """
    authorization = _login(request)
    if authorization is None:
        raise Unauthorized("authentication required", headers=challenge)
    credentials = BasicCredentials.parse(authorization)
    if credentials is None or not await htpasswd.check_password(credentials, request.client):
        raise Unauthorized("the user name or the password is wrong", headers=challenge)
    return credentials.user


def _login(request: Request) -> str | None:
    """Return the Authorization field of `request`, or None if it holds no login."""
    authorization = request.headers.get("authorization")
    return None if authorization is None or is_empty_login(authorization) else authorization


def _basic_challenge(realm: str) -> tuple[str, str]:
    return "WWW-Authenticate", f'Basic realm="{realm}"'

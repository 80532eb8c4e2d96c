"""Who a client is, without keeping what it said: identities by keyed hash, and tokens of our own.

A client that shows nothing at a token endpoint gets a token of ours, not upstream's. It means "no credential of its
own": so a credential of AUTH_REGISTRIES serves that client without ever reaching it, and with upstream gone the
token dance still ends well. A client that once proved a credential upstream gets such a token, with its identity in it,
while the token server cannot answer.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from attrs import define, field

from dockerproxy.oci.names import Registry
from dockerproxy.store.secret import load_or_create_secret
from dockerproxy.upstream.credentials import Anonymous, BasicCredentials, Credential

PUBLIC = "public"
"""The identity of everyone: what it may read, all may."""

TOKEN_LIFETIME = 3600
"""Seconds for which a token of ours holds."""

_TOKEN_PREFIX = "drp."
_MAX_BINDINGS = 10_000


@define
class Bindings:
    """Which tokens of upstream's stand for which client: identities by identities, the latest of them.

    `tell` is called with each pair that is found out here: for other processes, which `note` it.
    """

    on_bind: Callable[[str, str], None] = lambda token, client: None
    _clients: OrderedDict[str, str] = field(factory=OrderedDict, init=False)

    def bind(self, token: str, client: str) -> None:
        """Let `token` stand for `client`, here and in other processes."""
        self.add(token, client)
        self.on_bind(token, client)

    def add(self, token: str, client: str) -> None:
        """Let `token` stand for `client`, as another process found out."""
        self._clients[token] = client
        while len(self._clients) > _MAX_BINDINGS:
            self._clients.popitem(last=False)

    def resolve(self, identity: str) -> str:
        """Return whom `identity` stands for, itself if that is not known."""
        return self._clients.get(identity, identity)


class Identities:
    """Makes identities and tokens with one secret, so that they hold over a restart and in every worker process."""

    def __init__(self, secret: bytes, bindings: Bindings | None = None) -> None:
        self._secret = secret
        self._bindings = bindings or Bindings()

    @classmethod
    def open(cls, path: Path, bindings: Bindings | None = None) -> Identities:
        """Use the secret kept at `path` (mode 0600), made on first use. Raises OSError."""
        return cls(load_or_create_secret(path), bindings)

    def for_credential(self, registry: Registry, credential: Credential) -> str:
        """Return the identity that `credential` stands for at `registry`."""
        if isinstance(credential, Anonymous):
            return PUBLIC
        if isinstance(credential, BasicCredentials):
            return "login:" + self._hash(f"{registry}\n{credential.user}")
        return self._bindings.resolve(self._client_identity(credential.authorization))

    def bind(self, token: str, authorization: str) -> None:
        """Note that upstream gave `token` for `authorization`: the two are one client."""
        self._bindings.bind(self._client_identity(f"Bearer {token}"), self._client_identity(authorization))

    def for_authorization(self, authorization: str) -> str:
        """Return the identity of a client's own Authorization."""
        return self._client_identity(authorization)

    def issue_token(self, registry: Registry, identity: str, now: float) -> str:
        """Return a token of ours for `registry` that vouches for `identity` (PUBLIC: for nobody)."""
        payload = f"{registry}\n{identity}\n{int(now) + TOKEN_LIFETIME}".encode()
        return _TOKEN_PREFIX + urlsafe_b64encode(payload + self._sign(payload)).decode()

    def read_token(self, registry: Registry, authorization: str, now: float) -> str | None:
        """Return the identity that an Authorization with a token of ours vouches for.

        None where it is no token of ours: then it is the client's own. A token of ours that has ended, was altered or
        was given for another registry gives ``""``.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token.startswith(_TOKEN_PREFIX):
            return None
        try:
            signed = urlsafe_b64decode(token.removeprefix(_TOKEN_PREFIX))
            payload, signature = signed[:-32], signed[-32:]
            if not hmac.compare_digest(signature, self._sign(payload)):
                return ""
            host, identity, expires_at = payload.decode().split("\n")
        except ValueError:
            return ""
        return identity if host == str(registry) and now < int(expires_at) else ""

    def _client_identity(self, authorization: str) -> str:
        return "own:" + self._hash(authorization)

    def _hash(self, text: str) -> str:
        return hmac.new(self._secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]

    def _sign(self, payload: bytes) -> bytes:
        return hmac.new(self._secret, b"token\n" + payload, hashlib.sha256).digest()

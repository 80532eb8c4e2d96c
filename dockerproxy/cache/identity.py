"""Client identities: keyed hashes of credentials, and tokens issued by this proxy ("local tokens").

Credentials are never stored; an identity is a keyed hash. A client without a credential gets a local token from the
token endpoint, not one from upstream. The token means "no credential of its own". A login from AUTH_REGISTRIES can
therefore serve the client without being exposed to it, and the token exchange succeeds even if upstream is down. If the
token server is down, a client that has authenticated there before gets a local token that carries its identity.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable

from attrs import define, field

from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.credentials import Anonymous, Credential

PUBLIC = "public"
"""The identity of clients without a credential. Every client may read the repositories that PUBLIC may read."""

TOKEN_LIFETIME = 3600
"""Lifetime of a local token in seconds."""

_TOKEN_PREFIX = "drp."
_MAX_BINDINGS = 10_000


@define
class Bindings:
    """Maps the identity of an upstream token to the identity of its client. Keeps the latest _MAX_BINDINGS pairs.

    Functions that `subscribe` are called with each new pair so that other processes can `add` it.
    """

    _clients: OrderedDict[str, str] = field(factory=OrderedDict, init=False)
    _subscribers: list[Callable[[str, str], None]] = field(factory=list, init=False)

    def subscribe(self, on_bind: Callable[[str, str], None]) -> None:
        """Call `on_bind` with each pair that this process binds from now on."""
        self._subscribers.append(on_bind)

    def bind(self, token: str, client: str) -> None:
        """Map `token` to `client`, here and in other processes."""
        self.add(token, client)
        for on_bind in self._subscribers:
            on_bind(token, client)

    def add(self, token: str, client: str) -> None:
        """Map `token` to `client` in this process only."""
        self._clients[token] = client
        while len(self._clients) > _MAX_BINDINGS:
            self._clients.popitem(last=False)

    def resolve(self, identity: str) -> str:
        """Return the client that `identity` belongs to; `identity` itself if it is not bound."""
        return self._clients.get(identity, identity)


class Identities:
    """Derives identities and local tokens from one secret.

    They are therefore valid across restarts and in every worker process.
    """

    def __init__(self, secret: bytes, bindings: Bindings | None = None) -> None:
        self._secret = secret
        self._bindings = bindings or Bindings()

    def for_credential(self, registry: Registry, credential: Credential) -> str:
        """Return the identity of `credential` at `registry`."""
        if isinstance(credential, Anonymous):
            return PUBLIC
        if isinstance(credential, BasicCredentials):
            return "login:" + self._hash(f"{registry}\n{credential.user}")
        return self._bindings.resolve(self._client_identity(credential.authorization))

    def bind(self, token: str, authorization: str) -> None:
        """Record that upstream issued `token` for `authorization`: both belong to one client."""
        self._bindings.bind(self._client_identity(f"Bearer {token}"), self._client_identity(authorization))

    def for_authorization(self, authorization: str) -> str:
        """Return the identity of a client's Authorization field."""
        return self._client_identity(authorization)

    def issue_token(self, registry: Registry, identity: str, now: float) -> str:
        """Return a local token for `registry` that carries `identity` (PUBLIC if the client has none)."""
        payload = f"{registry}\n{identity}\n{int(now) + TOKEN_LIFETIME}".encode()
        return _TOKEN_PREFIX + urlsafe_b64encode(payload + self._sign(payload)).decode()

    def read_token(self, registry: Registry, authorization: str, now: float) -> str | None:
        """Return the identity in the local token of an Authorization field.

        Return None if it holds no local token but the client's own credential. Return ``""`` if the local token has
        expired, was altered, or was issued for another registry.
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

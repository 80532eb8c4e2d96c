"""Client identities: keyed hashes of credentials, and tokens issued by this proxy ("local tokens").

Credentials are never stored; an identity is a keyed hash. A token that upstream issued to a client without a credential
is bound to PUBLIC: it means "no credential of its own", so that a login from AUTH_REGISTRIES can serve the client. If
the token server is down, the client gets a local token, which means the same, and one that has authenticated there
before gets a local token that carries its identity.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from attrs import define, field, frozen

from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, is_empty_login
from dockerproxy.oci.names import Registry, Repository
from dockerproxy.upstream.credentials import Anonymous, Credential

PUBLIC = "public"
"""The identity of clients without a credential. Every client may read the repositories that PUBLIC may read."""

LOGIN_PREFIX = "login:"
"""The start of the identities of the administrator's logins, which serve clients without one."""

TOKEN_LIFETIME = 3600
"""Lifetime of a local token in seconds."""

_TOKEN_PREFIX = "drp."
_SIGNATURE_SIZE = 32
_MAX_BINDINGS = 10_000


@frozen
class Binding:
    """The origin of an upstream token: the realm that issued it, the identity of the client that it was issued to, the
    repositories that it was issued for, and the Unix time at which it ends."""

    realm: str
    client: str
    repositories: frozenset[str]
    expires_at: float

    @property
    def group(self) -> tuple[str, bool]:
        """The tokens among which this one may be displaced: those of its realm, with or without a credential."""
        return self.realm, self.client == PUBLIC


OnBind = Callable[[str, str, str, list[str], float], None]
"""Gets a token's identity and the values of its `Binding`, which are JSON."""


@define
class Bindings:
    """Maps the identity of an upstream token to its `Binding`. Keeps _MAX_BINDINGS.

    Beyond that, the realm with the most tokens loses the one that was used least recently, and tokens of clients
    without a credential are apart. So a hostile realm, which can issue any number, displaces no others, nor do clients
    without a login, who can ask for any number. Functions that `subscribe` are called with each new binding so that
    other processes can `add` it.
    """

    _by_token: dict[str, Binding] = field(factory=dict, init=False)
    _groups: dict[tuple[str, bool], OrderedDict[str, None]] = field(factory=dict, init=False)
    _subscribers: list[OnBind] = field(factory=list, init=False)

    def subscribe(self, on_bind: OnBind) -> None:
        """Call `on_bind` with each token that this process binds from now on."""
        self._subscribers.append(on_bind)

    def bind(self, token: str, binding: Binding) -> None:
        """Bind `token`, here and in other processes."""
        values = (token, binding.realm, binding.client, sorted(binding.repositories), binding.expires_at)
        self.add(*values)
        for on_bind in self._subscribers:
            on_bind(*values)

    def add(self, token: str, realm: str, client: str, repositories: list[str], expires_at: float) -> None:
        """Bind `token` in this process only."""
        self._remove(token)
        if len(self._by_token) >= _MAX_BINDINGS:
            largest = max(self._groups.values(), key=len)
            self._remove(next(iter(largest)))
        binding = self._by_token[token] = Binding(realm, client, frozenset(repositories), expires_at)
        self._groups.setdefault(binding.group, OrderedDict())[token] = None

    def get(self, token: str) -> Binding | None:
        """Return the binding of `token`, None if it is not known."""
        binding = self._by_token.get(token)
        if binding is not None:
            self._groups[binding.group].move_to_end(token)
        return binding

    def _remove(self, token: str) -> None:
        binding = self._by_token.pop(token, None)
        if binding is not None:
            tokens = self._groups[binding.group]
            del tokens[token]
            if not tokens:
                del self._groups[binding.group]


@frozen
class LocalToken:
    """A local token that a client shows. It carries `identity` at `repositories`, and PUBLIC at all others."""

    identity: str
    repositories: frozenset[str] = frozenset()

    def identity_at(self, name: Repository) -> str:
        """Return the identity of the client at the repository `name`."""
        return self.identity if name in self.repositories else PUBLIC


INVALID_TOKEN = LocalToken("")
PUBLIC_TOKEN = LocalToken(PUBLIC)


class Identities:
    """Derives identities and local tokens from one secret.

    They are therefore valid across restarts and in every worker process. `clock` returns Unix time.
    """

    def __init__(self, secret: bytes, clock: Callable[[], float], bindings: Bindings | None = None) -> None:
        self._secret = secret
        self._clock = clock
        self._bindings = bindings or Bindings()

    def for_credential(self, registry: Registry, name: Repository, credential: Credential) -> str:
        """Return the identity of `credential` at the repository `name` of `registry`."""
        if isinstance(credential, Anonymous):
            return PUBLIC
        if isinstance(credential, BasicCredentials | IdentityToken):
            return LOGIN_PREFIX + self._hash(f"{registry}\n{credential.user}")
        return self._for_client(registry, name, credential.authorization)

    def _for_client(self, registry: Registry, name: Repository, authorization: str) -> str:
        """Return the identity behind an Authorization field.

        A token counts as its client only for the repositories that it was issued for, and until its end. Otherwise it
        has an identity of its own, about which upstream must be asked; after its end, another one.
        """
        hashed = self._hash(canonical_authorization(authorization))
        binding = self._bindings.get(hashed)
        if binding is not None and binding.expires_at <= self._clock():
            return self._own_identity(f"{registry}\nexpired", hashed)
        if binding is not None and name in binding.repositories:
            return binding.client
        return self._own_identity(str(registry), hashed)

    def bind(
        self, token: str, issuer: str, authorization: str, repositories: frozenset[Repository], expires_at: float
    ) -> None:
        """Record that the realm `issuer` issued `token` for `authorization` and `repositories`, until a time."""
        client = self.for_authorization(issuer, authorization)
        binding = Binding(issuer, client, frozenset(repositories), expires_at)
        self._bindings.bind(self._hash(f"Bearer {token}"), binding)

    def bind_public(self, token: str, issuer: str, expires_at: float) -> None:
        """Record that the realm `issuer` issued `token` to a client without a credential, until a time."""
        self._bindings.bind(self._hash(f"Bearer {token}"), Binding(issuer, PUBLIC, frozenset(), expires_at))

    def is_bound(self, authorization: str) -> bool:
        """Return whether an Authorization field holds a token that was bound."""
        return self._bindings.get(self._hash(canonical_authorization(authorization))) is not None

    def for_authorization(self, issuer: str, authorization: str) -> str:
        """Return the identity of a client's Authorization field at `issuer`, a realm or registry that verifies it.

        Another issuer's word about the same credential is about another identity. Otherwise a hostile registry could
        confirm a guessed password in place of the one whose password it is.
        """
        return self._own_identity(issuer, self._hash(canonical_authorization(authorization)))

    def issue_token(self, identity: str, repositories: frozenset[Repository] = frozenset()) -> str:
        """Return a local token that carries `identity` (PUBLIC if the client has none) at `repositories`.

        It names no registry. An identity belongs to a realm, and has grants only at registries that accept its tokens.
        """
        expires_at = int(self._clock()) + TOKEN_LIFETIME
        payload = f"{identity}\n{expires_at}\n{' '.join(sorted(repositories))}".encode()
        return _TOKEN_PREFIX + urlsafe_b64encode(payload + self._sign(payload)).decode()

    def read_token(self, authorization: str) -> LocalToken | None:
        """Return the local token of an Authorization field. Return None if it holds the client's own credential.

        Return `INVALID_TOKEN` if the local token has expired or was altered, and `PUBLIC_TOKEN` for upstream's token of
        a client without a credential.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer":
            return None
        if not token.startswith(_TOKEN_PREFIX):
            binding = self._bindings.get(self._hash(f"Bearer {token}"))
            is_public = binding is not None and binding.client == PUBLIC and self._clock() < binding.expires_at
            return PUBLIC_TOKEN if is_public else None
        try:
            signed = urlsafe_b64decode(token.removeprefix(_TOKEN_PREFIX))
            payload, signature = signed[:-_SIGNATURE_SIZE], signed[-_SIGNATURE_SIZE:]
            if not hmac.compare_digest(signature, self._sign(payload)):
                return INVALID_TOKEN
            identity, expires_at, names = payload.decode().split("\n")
        except ValueError:
            return INVALID_TOKEN
        return LocalToken(identity, frozenset(names.split())) if self._clock() < int(expires_at) else INVALID_TOKEN

    def _own_identity(self, issuer: str, hashed: str) -> str:
        return "own:" + self._hash(f"{issuer}\n{hashed}")

    def _hash(self, text: str) -> str:
        # BLAKE2 with a key takes a fourth of the time of HMAC for short texts.
        content = text.encode("utf-8", "surrogateescape")
        return blake2b(content, digest_size=16, key=self._secret, person=b"identity").hexdigest()

    def _sign(self, payload: bytes) -> bytes:
        return blake2b(payload, digest_size=_SIGNATURE_SIZE, key=self._secret, person=b"token").digest()


def canonical_authorization(authorization: str) -> str:
    """Return one spelling of an Authorization field with a token, and any other field as it is.

    All spellings have one identity, so they have to be one request to upstream too. Otherwise a client could pad its
    token until upstream fails on it, and get what is served during an outage.
    """
    scheme, _, token = authorization.partition(" ")
    return f"Bearer {token.strip()}" if scheme.lower() == "bearer" else authorization


def client_authorization(authorization: str) -> str | None:
    """Return the `canonical_authorization` of a client's Authorization field; None if it holds no login."""
    return None if is_empty_login(authorization) else canonical_authorization(authorization)

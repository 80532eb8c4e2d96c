"""A token server as Docker Hub has one: its tokens are signed, and the registry beside it checks them."""

from __future__ import annotations

import base64
import datetime
import json
import secrets
import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from tests.e2e.house.serving import Exchange, Server

ISSUER = "auth.docker.io"
SERVICE = "registry.docker.io"


class TokenServer(Server):
    """Gives tokens to `users` (name to password) and to anyone for public repositories.

    A repository is private where `owners` has it; only the users named there get a token with rights to it. As on
    Docker Hub, less is granted than was asked for without an error.
    """

    def __init__(self, context: ssl.SSLContext, folder: Path) -> None:
        super().__init__(context)
        self.users: dict[str, str] = {}
        self.owners: dict[str, set[str]] = {}
        self.lifetime = 300
        self.failure: int | None = None
        self.tokens: list[str] = []
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = _self_signed(self._key)
        self.bundle = folder / "token-signer.pem"
        self.bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def serve(self, exchange: Exchange) -> None:
        body = b"".join(exchange.body())
        if self.failure is not None:
            return exchange.answer(self.failure, {"Content-Type": "application/json"}, b'{"details":"no"}')
        if exchange.path != "/token" or exchange.method != "GET" or body:
            return exchange.answer(404, {"Content-Type": "text/plain"}, b"404 page not found\n")
        user = self._user(exchange.seen.headers.get("authorization"))
        if user is None:
            answer = {"details": "incorrect username or password"}
            return exchange.answer(401, {"Content-Type": "application/json"}, json.dumps(answer).encode())
        query = parse_qs(exchange.query)
        token = self.sign(user, query.get("scope", []))
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        grant = {"token": token, "access_token": token, "expires_in": self.lifetime, "issued_at": now}
        exchange.answer(200, {"Content-Type": "application/json"}, json.dumps(grant).encode())

    def sign(self, user: str, scopes: list[str], *, everything: bool = False) -> str:
        """Return a token for what `user` may do of what `scopes` ask for."""
        access = []
        for scope in " ".join(scopes).split():
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            granted = actions.split(",") if everything else self._granted(user, name, actions.split(","))
            if granted:
                access.append({"type": kind, "name": name, "actions": granted})
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "iat": now,
            "nbf": now - 60,
            "exp": now + self.lifetime,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        certificate = base64.b64encode(self._certificate.public_bytes(serialization.Encoding.DER)).decode()
        head = {"typ": "JWT", "alg": "ES256", "x5c": [certificate]}
        signed = f"{_encode(head)}.{_encode(claims)}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        token = f"{signed}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"
        self.tokens.append(token)
        return token

    def _granted(self, user: str, name: str, actions: list[str]) -> list[str]:
        owners = self.owners.get(name)
        if owners is None:
            return [action for action in actions if action == "pull" or user]
        return actions if user in owners else []

    def _user(self, authorization: str | None) -> str | None:
        """Return who asks, ``""`` for nobody in particular, None where the password is wrong."""
        if authorization is None:
            return ""
        kind, _, encoded = authorization.partition(" ")
        name, _, password = base64.b64decode(encoded).decode().partition(":")
        good = kind.lower() == "basic" and secrets.compare_digest(self.users.get(name, ""), password) and password
        return name if good else None


def _encode(value: dict[str, Any]) -> str:
    return _base64(json.dumps(value, separators=(",", ":")).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "token signer")])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .sign(key, hashes.SHA256())
    )

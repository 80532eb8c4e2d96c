"""A token server like Docker Hub's: it signs tokens, and docker-registry verifies them."""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import secrets
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

from tests.e2e.harness.http_server import HTTPExchange, StubServer

ISSUER = "auth.docker.io"
SERVICE = "registry.docker.io"


class TokenServer(StubServer):
    """Issues tokens to `users` (name to password), and to anonymous clients for public repositories.

    A repository in `owners` is private: only the users named there get a token with access to it. As on Docker Hub, a
    token may grant less than the client requested, without an error.
    """

    def __init__(self, context: ssl.SSLContext, folder: Path) -> None:
        super().__init__(context)
        self.users: dict[str, str] = {}
        self.identity_tokens: dict[str, str] = {}  # identity tokens and their users
        self.owners: dict[str, set[str]] = {}
        self.token_lifetime = 300
        self.failure_status: int | None = None
        self.behaviour: Callable[[HTTPExchange, None], None] | None = None
        """A response in the place of the token server's: a wall's, for example."""
        self.coding = ""
        """A content coding of tokens, though none was asked for."""
        self.issued_tokens: list[str] = []
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = _self_signed(self._key)
        self.certificate_bundle = folder / "token-signer.pem"
        self.certificate_bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def handle(self, exchange: HTTPExchange) -> None:
        body = b"".join(exchange.read_body())
        if self.behaviour is not None:
            return self.behaviour(exchange, None)
        if self.failure_status is not None:
            return exchange.respond(self.failure_status, {"Content-Type": "application/json"}, b'{"details":"no"}')
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        if exchange.path != "/token" or exchange.method != ("POST" if form.get("refresh_token") else "GET"):
            return exchange.respond(404, {"Content-Type": "text/plain"}, b"404 page not found\n")
        if form:
            return self._exchange_identity_token(exchange, form)
        user = self._authenticate(exchange.request.headers.get("authorization"))
        if user is None:
            error_body = {"details": "incorrect username or password"}
            return exchange.respond(401, {"Content-Type": "application/json"}, json.dumps(error_body).encode())
        self._respond_with_token(exchange, user, parse_qs(exchange.query).get("scope", []))

    def _exchange_identity_token(self, exchange: HTTPExchange, form: dict[str, str]) -> None:
        """Respond to the POST of OAuth 2 with a refresh token, as Azure's registry does."""
        user = self.identity_tokens.get(form["refresh_token"])
        if user is None or form.get("grant_type") != "refresh_token":
            return exchange.respond(400, {"Content-Type": "application/json"}, b'{"error":"invalid_grant"}')
        self._respond_with_token(exchange, user, form.get("scope", "").split())

    def _respond_with_token(self, exchange: HTTPExchange, user: str, scopes: list[str]) -> None:
        token = self.issue_token(user, scopes)
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        token_response = {"token": token, "access_token": token, "expires_in": self.token_lifetime, "issued_at": now}
        fields, content = {"Content-Type": "application/json"}, json.dumps(token_response).encode()
        if self.coding == "gzip":
            fields["Content-Encoding"], content = self.coding, gzip.compress(content)
        exchange.respond(200, fields, content)

    def issue_token(self, user: str, scopes: list[str], *, grant_all: bool = False) -> str:
        """Return a token with the requested `scopes`, reduced to the access that `user` has."""
        access = []
        for scope in " ".join(scopes).split():
            resource_type, _, remainder = scope.partition(":")
            name, _, actions = remainder.rpartition(":")
            granted_actions = actions.split(",") if grant_all else self._granted_actions(user, name, actions.split(","))
            if granted_actions:
                access.append({"type": resource_type, "name": name, "actions": granted_actions})
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "iat": now,
            "nbf": now - 60,
            "exp": now + self.token_lifetime,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        certificate = base64.b64encode(self._certificate.public_bytes(serialization.Encoding.DER)).decode()
        header = {"typ": "JWT", "alg": "ES256", "x5c": [certificate]}
        signing_input = f"{_encode(header)}.{_encode(claims)}"
        r, s = decode_dss_signature(self._key.sign(signing_input.encode(), ec.ECDSA(hashes.SHA256())))
        token = f"{signing_input}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"
        self.issued_tokens.append(token)
        return token

    def _granted_actions(self, user: str, name: str, actions: list[str]) -> list[str]:
        owners = self.owners.get(name)
        if owners is None:
            return [action for action in actions if action == "pull" or user]
        return actions if user in owners else []

    def _authenticate(self, authorization: str | None) -> str | None:
        """Return the user's name, ``""`` for an anonymous client, or None if the password is wrong."""
        if authorization is None:
            return ""
        scheme, _, encoded = authorization.partition(" ")
        name, _, password = base64.b64decode(encoded).decode().partition(":")
        is_valid = scheme.lower() == "basic" and secrets.compare_digest(self.users.get(name, ""), password) and password
        return name if is_valid else None


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

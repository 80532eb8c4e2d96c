"""All the upstream servers of the tests, with the names that the world knows them by."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import secrets
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.servers import free_port
from tests.e2e.house.docker_registry import DockerRegistry, RedirectingFront, SignedStore, push
from tests.e2e.house.fake_registry import FakeRegistry
from tests.e2e.house.images import Image
from tests.e2e.house.pki import Authority
from tests.e2e.house.process import need
from tests.e2e.house.serving import Exchange
from tests.e2e.house.token_server import SERVICE, TokenServer

HUB = "https://registry-1.docker.io"
TOKENS = "https://auth.docker.io/token"
REGISTRY = "https://registry.test:5443"
PLAIN = "http://plain.test:8080"
BASIC = "https://basic.test"
FAKE = "https://fake.test"
STORE = "store.test:8443"

REDIRECTING = "https://redirecting.test"
RELATIVE = "https://relative.test"
"""Fronts of `REGISTRY` whose blobs lie elsewhere: absolute Locations at another host, relative ones at their own."""


class Upstreams:
    """The servers, started together and shared by all tests; each has its own names for what it puts there."""

    def __init__(self, folder: Path) -> None:
        need("docker-registry")
        self.authority = Authority(folder / "pki", "the upstreams' CA")
        self.trust = self.authority.client_context()
        strangers = Authority(folder / "strangers", "a CA that nobody trusts")
        leaf = self.authority.leaf
        self.users = {"alice": f"pw-al:ice-{secrets.token_hex(8)}", "bob": f"pw-bob-{secrets.token_hex(8)}"}
        self.registry = DockerRegistry(folder / "registry", "registry.test", leaf("registry.test"))
        self.plain = DockerRegistry(folder / "plain", "plain.test")
        self.tokens = TokenServer(leaf("auth.docker.io").server_context(), folder)
        self.tokens.users.update(self.users)
        self.hub = DockerRegistry(
            folder / "hub", "registry-1.docker.io", leaf("registry-1.docker.io"), _token_auth(self.tokens)
        )
        self.basic = DockerRegistry(
            folder / "basic", "basic.test", leaf("basic.test"), _basic_auth(folder / "htpasswd", self.users)
        )
        self.store = SignedStore(leaf("store.test").server_context(), self.registry)
        elsewhere = f"https://{STORE}/blobs/{{digest}}?Expires=1&Signature={{signature}}"
        self.redirecting = RedirectingFront(
            leaf("redirecting.test").server_context(), self.registry, self.trust, elsewhere
        )
        self.relative = _SelfContained(leaf("relative.test").server_context(), self.registry, self.trust)
        self.fake = FakeRegistry(leaf("fake.test").server_context())
        self.self_signed = FakeRegistry(strangers.leaf("selfsigned.test").server_context())
        self.wrong_name = FakeRegistry(leaf("somebody-else.test").server_context())
        self.expired = FakeRegistry(leaf("expired.test", days=-1).server_context())
        self._closed_port = free_port()
        self._programs = (self.registry, self.plain, self.hub, self.basic)
        self._servers = (
            self.tokens, self.store, self.redirecting, self.relative, self.fake, self.self_signed, self.wrong_name,
            self.expired,
        )  # fmt: skip

    def start(self) -> None:
        for server in self._servers:
            server.start()
        for program in self._programs:
            program.start()

    def stop(self) -> None:
        for server in self._servers:
            server.stop()
        for program in self._programs:
            program.stop()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Have every upstream switched off for a while."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def addresses(self) -> dict[str, int]:
        """Where each host is: "name:port" to a port of 127.0.0.1."""
        return {
            "registry-1.docker.io:443": self.hub.port,
            "auth.docker.io:443": self.tokens.port,
            "registry.test:5443": self.registry.port,
            "plain.test:8080": self.plain.port,
            "basic.test:443": self.basic.port,
            STORE: self.store.port,
            "redirecting.test:443": self.redirecting.port,
            "relative.test:443": self.relative.port,
            "fake.test:443": self.fake.port,
            "selfsigned.test:443": self.self_signed.port,
            "wrongname.test:443": self.wrong_name.port,
            "expired.test:443": self.expired.port,
            "closed.test:443": self._closed_port,
        }

    @property
    def settings(self) -> dict[str, str]:
        """What the daemon has to know to reach them all."""
        return {
            "REGISTRIES": " ".join((
                "registry.test:5443", PLAIN, "basic.test", "redirecting.test", "relative.test", "fake.test",
                "selfsigned.test", "wrongname.test", "expired.test", "closed.test", "no-such-name.invalid",
            )),
            "UPSTREAM_ADDRESSES": address_list(self.addresses),
            "UPSTREAM_CA_FILE": str(self.authority.file),
        }  # fmt: skip

    @property
    def secrets(self) -> list[str]:
        """What must never be in a log: passwords, what Basic makes of them, tokens, signatures."""
        logins = [base64.b64encode(f"{user}:{password}".encode()).decode() for user, password in self.users.items()]
        return [*self.users.values(), *logins, *self.tokens.tokens, SignedStore.SIGNATURE]

    def basic_login(self, user: str) -> str:
        """Return the Authorization that `user` logs in with."""
        return "Basic " + base64.b64encode(f"{user}:{self.users[user]}".encode()).decode()

    # putting images there

    def on_hub(self, name: str, tag: str, image: Image, owners: set[str] | None = None) -> Image:
        """Push an image to the hub; it is private where it has owners."""
        if owners is not None:
            self.tokens.owners[name] = owners
        token = self.tokens.sign("the tests", [f"repository:{name}:pull,push"], everything=True)
        return push(self.hub, name, tag, image, self.trust, f"Bearer {token}")

    def on_registry(self, name: str, tag: str, image: Image) -> Image:
        return push(self.registry, name, tag, image, self.trust)

    def on_plain(self, name: str, tag: str, image: Image) -> Image:
        return push(self.plain, name, tag, image)

    def on_basic(self, name: str, tag: str, image: Image) -> Image:
        return push(self.basic, name, tag, image, self.trust, self.basic_login("alice"))


class _SelfContained(RedirectingFront):
    """Sends readers of blobs to another path of its own, by a Location without a host."""

    def __init__(self, context: ssl.SSLContext, registry: DockerRegistry, trust: ssl.SSLContext) -> None:
        super().__init__(context, registry, trust, "/objects/{digest}?Signature={signature}")
        self._objects = SignedStore(context, registry, strict=False)

    def serve(self, exchange: Exchange) -> None:
        if exchange.path.startswith("/objects/"):
            self._objects.serve(exchange)
        else:
            super().serve(exchange)


def address_list(addresses: Mapping[str, int]) -> str:
    """Return `addresses` as UPSTREAM_ADDRESSES has them."""
    return " ".join(f"{host}=127.0.0.1:{port}" for host, port in addresses.items())


def _token_auth(tokens: TokenServer) -> dict[str, object]:
    options = {"realm": TOKENS, "service": SERVICE, "issuer": "auth.docker.io", "rootcertbundle": str(tokens.bundle)}
    return {"token": options}


def _basic_auth(file: Path, users: Mapping[str, str]) -> dict[str, object]:
    file.write_text("".join(f"{user}:{_bcrypt(password)}\n" for user, password in users.items()))
    return {"htpasswd": {"realm": "basic-realm", "path": str(file)}}


def _bcrypt(password: str) -> str:
    """Hash as htpasswd -B does; the C library has it, Python from 3.13 on has not."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    hashed = crypt(password.encode(), b"$2b$04$" + secrets.token_hex(11).encode())
    assert isinstance(hashed, bytes) and hashed.startswith(b"$2b$")
    return hashed.decode()

"""All upstream servers of the tests, and their public host names."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import secrets
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.servers import free_port
from tests.e2e.harness.docker_registry import DockerRegistry, RedirectingRegistry, SignedURLStore, push_image
from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.http_server import HTTPExchange, StubServer
from tests.e2e.harness.images import SampleImage
from tests.e2e.harness.pki import UpstreamCA
from tests.e2e.harness.process import require_programs
from tests.e2e.harness.token_server import SERVICE, TokenServer

HUB = "https://registry-1.docker.io"
HUB_ALIASES = ("index.docker.io", "docker.io", "registry.hub.docker.com")
TOKEN_URL = "https://auth.docker.io/token"
REGISTRY = "https://registry.test:5443"
PLAIN = "http://plain.test:8080"
BASIC = "https://basic.test"
FAKE = "https://fake.test"
STORE_HOST = "store.test:8443"

REDIRECTING_ABSOLUTE = "https://redirecting.test"
REDIRECTING_RELATIVE = "https://relative.test"
"""Frontends of `REGISTRY` that redirect GETs of blobs: to another host, or to a relative Location on the same host."""


class Upstreams:
    """The upstream servers, started together and shared by all tests. Each test uses repository names of its own."""

    def __init__(self, folder: Path) -> None:
        require_programs("docker-registry")
        self.ca = UpstreamCA(folder / "pki", "the upstreams' CA")
        self.client_context = self.ca.client_context()
        untrusted_ca = UpstreamCA(folder / "strangers", "a CA that nobody trusts")
        leaf = self.ca.leaf
        self.users = {"alice": f"pw-al:ice-{secrets.token_hex(8)}", "bob": f"pw-bob-{secrets.token_hex(8)}"}
        self.registry = DockerRegistry(folder / "registry", "registry.test", leaf("registry.test"))
        self.plain = DockerRegistry(folder / "plain", "plain.test")
        self.token_server = TokenServer(leaf("auth.docker.io").server_context(), folder)
        self.token_server.users.update(self.users)
        self.hub = DockerRegistry(
            folder / "hub", "registry-1.docker.io", leaf("registry-1.docker.io"), token_auth_config(self.token_server)
        )
        self.hub_pages = HubPages(leaf(*HUB_ALIASES).server_context())
        self.basic = DockerRegistry(
            folder / "basic", "basic.test", leaf("basic.test"), basic_auth_config(folder / "htpasswd", self.users)
        )
        self.store = SignedURLStore(leaf("store.test").server_context(), self.registry)
        location_template = f"https://{STORE_HOST}/blobs/{{digest}}?Expires=1&Signature={{signature}}"
        self.redirecting = RedirectingRegistry(
            leaf("redirecting.test").server_context(), self.registry, self.client_context, location_template
        )
        self.relative = RelativeRedirectingRegistry(
            leaf("relative.test").server_context(), self.registry, self.client_context
        )
        self.fake = FakeRegistry(leaf("fake.test").server_context())
        self.self_signed = FakeRegistry(untrusted_ca.leaf("selfsigned.test").server_context())
        self.wrong_name = FakeRegistry(leaf("other-name.test").server_context())
        self.expired = FakeRegistry(leaf("expired.test", valid_days=-1).server_context())
        self._closed_port = free_port()
        self._registries = (self.registry, self.plain, self.hub, self.basic)
        self._stub_servers = (
            self.token_server, self.store, self.redirecting, self.relative, self.fake, self.self_signed,
            self.wrong_name, self.expired, self.hub_pages,
        )  # fmt: skip

    def start(self) -> None:
        for server in self._stub_servers:
            server.start()
        for program in self._registries:
            program.start()

    def stop(self) -> None:
        for server in self._stub_servers:
            server.stop()
        for program in self._registries:
            program.stop()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop every upstream for the time of the context."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def addresses(self) -> dict[str, int]:
        """The address of each host: "name:port" to a port of 127.0.0.1."""
        return {
            "registry-1.docker.io:443": self.hub.port,
            **{f"{name}:443": self.hub_pages.port for name in HUB_ALIASES},
            "auth.docker.io:443": self.token_server.port,
            "registry.test:5443": self.registry.port,
            "plain.test:8080": self.plain.port,
            "basic.test:443": self.basic.port,
            STORE_HOST: self.store.port,
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
        """The settings with which the daemon reaches all upstreams."""
        return {
            "REGISTRIES": " ".join((
                "registry.test:5443", PLAIN, "basic.test", "redirecting.test", "relative.test", "fake.test",
                "selfsigned.test", "wrongname.test", "expired.test", "closed.test", "no-such-name.invalid",
            )),
            "UPSTREAM_ADDRESSES": format_upstream_addresses(self.addresses),
            "UPSTREAM_CA_FILE": str(self.ca.ca_file),
        }  # fmt: skip

    @property
    def secrets(self) -> list[str]:
        """Strings that must never be in a log: passwords, Basic credentials, tokens and signatures."""
        encoded_credentials = [
            base64.b64encode(f"{user}:{password}".encode()).decode() for user, password in self.users.items()
        ]
        return [*self.users.values(), *encoded_credentials, *self.token_server.issued_tokens, SignedURLStore.SIGNATURE]

    def basic_authorization(self, user: str) -> str:
        """Return the Authorization header of `user`."""
        return basic_authorization(user, self.users[user])

    # pushing images

    def push_to_hub(self, name: str, tag: str, image: SampleImage, owners: set[str] | None = None) -> SampleImage:
        """Push an image to Docker Hub's stand-in. It is private if `owners` are given."""
        if owners is not None:
            self.token_server.owners[name] = owners
        token = self.token_server.issue_token("the tests", [f"repository:{name}:pull,push"], grant_all=True)
        return push_image(self.hub, name, tag, image, self.client_context, f"Bearer {token}")

    def push_to_registry(self, name: str, tag: str, image: SampleImage) -> SampleImage:
        return push_image(self.registry, name, tag, image, self.client_context)

    def push_to_plain(self, name: str, tag: str, image: SampleImage) -> SampleImage:
        return push_image(self.plain, name, tag, image)

    def push_to_basic(self, name: str, tag: str, image: SampleImage) -> SampleImage:
        return push_image(self.basic, name, tag, image, self.client_context, self.basic_authorization("alice"))


class HubPages(StubServer):
    """The other names of Docker Hub: their web pages and the search, without a registry."""

    def handle(self, exchange: HTTPExchange) -> None:
        host = exchange.request.headers["host"]
        if exchange.path == "/":
            return exchange.respond(301, {"Location": "https://www.docker.com/"}, b"")
        found = {"name": f"found-at/{host}", "description": "", "star_count": 1, "is_official": False}
        content = {"host": host, "path": exchange.request.path, "num_results": 1, "results": [found]}
        exchange.respond(200, {"Content-Type": "application/json"}, json.dumps(content).encode())


class RelativeRedirectingRegistry(RedirectingRegistry):
    """Redirects GETs of blobs to another path on the same host, with a Location without a host."""

    def __init__(self, context: ssl.SSLContext, registry: DockerRegistry, client_context: ssl.SSLContext) -> None:
        super().__init__(context, registry, client_context, "/objects/{digest}?Signature={signature}")
        self._object_store = SignedURLStore(context, registry, reject_authorization=False)

    def handle(self, exchange: HTTPExchange) -> None:
        if exchange.path.startswith("/objects/"):
            self._object_store.handle(exchange)
        else:
            super().handle(exchange)


def format_upstream_addresses(addresses: Mapping[str, int]) -> str:
    """Return `addresses` in the format of the setting UPSTREAM_ADDRESSES."""
    return " ".join(f"{host}=127.0.0.1:{port}" for host, port in addresses.items())


def token_auth_config(token_server: TokenServer, realm: str = TOKEN_URL) -> dict[str, object]:
    token_options = {
        "realm": realm,
        "service": SERVICE,
        "issuer": "auth.docker.io",
        "rootcertbundle": str(token_server.certificate_bundle),
    }
    return {"token": token_options}


def basic_auth_config(htpasswd_file: Path, users: Mapping[str, str]) -> dict[str, object]:
    htpasswd_file.write_text("".join(f"{user}:{_bcrypt(password)}\n" for user, password in users.items()))
    return {"htpasswd": {"realm": "basic-realm", "path": str(htpasswd_file)}}


def _bcrypt(password: str) -> str:
    """Hash a password as `htpasswd -B` does, with the C library, because Python 3.13 has no crypt module."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    password_hash = crypt(password.encode(), b"$2b$04$" + secrets.token_hex(11).encode())
    assert isinstance(password_hash, bytes) and password_hash.startswith(b"$2b$")
    return password_hash.decode()

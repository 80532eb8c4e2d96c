"""The registries that the clients pull from, and the images there: one of a name of its own for each client."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import frozen

from tests.e2e.harness.docker_registry import DockerRegistry, RedirectingRegistry, SignedURLStore, push_image
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.images import SampleImage, build_index, build_small_image
from tests.e2e.harness.pki import UpstreamCA
from tests.e2e.harness.recording_proxy import RecordingProxy
from tests.e2e.harness.token_server import TokenServer
from tests.e2e.harness.upstreams import (
    STORE_HOST,
    basic_auth_config,
    format_upstream_addresses,
    token_auth_config,
)

USER = "alice"
PUSH_HOST = "basic.test"
"""The registry that clients push to, with a login."""


@frozen
class Source:
    """A kind of registry. `host` is its name in references; `has_login` tells that clients log in as `USER`."""

    key: str
    title: str
    host: str
    has_login: bool = False
    shared_login: bool = False
    """The proxy has the login (AUTH_REGISTRIES), so its clients do without. A client that goes directly has it."""

    def reference(self, client: str) -> str:
        """Return the reference of the image for `client`."""
        return f"{self.host}/{'private' if self.has_login else 'public'}/{client}:1"


SOURCES = (
    Source("hub", "Docker Hub", "docker.io"),
    Source("redirecting", "a registry that redirects blobs to a store", "redirecting.test"),
    Source("hub-private", "Docker Hub, a private image", "docker.io", has_login=True),
    Source("token", "private, with a token server on a host that is not in REGISTRIES", "private.test", has_login=True),
    Source("listed", "private, with a token server on a host in REGISTRIES", "listed.test", has_login=True),
    Source("basic", "private, with Basic authentication", "basic.test", has_login=True),
    Source("shared", "private, with the login in AUTH_REGISTRIES", "shared.test", has_login=True, shared_login=True),
)


def repository_name(reference: str) -> str:
    """Return the repository's name in a reference with a host and a tag."""
    return reference.partition("/")[2].rpartition(":")[0]


def pushed_image(client: str) -> str:
    """Return the reference of the image that `client` pulls and pushes elsewhere.

    It has one platform, because dockerd with the containerd image store refuses to push an index of which it has one.
    """
    return f"docker.io/single/{client}:1"


class UpstreamSet:
    """The registries, their token servers, and a proxy that tunnels to them: the Internet of these tests."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.ca = UpstreamCA(folder / "pki", "the upstreams' CA")
        self._context = self.ca.client_context()
        self.password = f"pw-{secrets.token_hex(8)}"
        users = {USER: self.password}
        leaf = self.ca.leaf
        (folder / "hub-tokens").mkdir()
        (folder / "tokens").mkdir()
        (folder / "listed-tokens").mkdir()
        self._hub_tokens = TokenServer(leaf("auth.docker.io").server_context(), folder / "hub-tokens")
        self._tokens = TokenServer(leaf("tokens.test").server_context(), folder / "tokens")
        self._listed_tokens = TokenServer(leaf("logins.test").server_context(), folder / "listed-tokens")
        for server in (self._hub_tokens, self._tokens, self._listed_tokens):
            server.users.update(users)
        self._hub = DockerRegistry(
            folder / "hub",
            "registry-1.docker.io",
            leaf("registry-1.docker.io", "index.docker.io"),
            token_auth_config(self._hub_tokens),
        )
        self._private = DockerRegistry(
            folder / "private",
            "private.test",
            leaf("private.test"),
            token_auth_config(self._tokens, realm="https://tokens.test/token"),
        )
        self._listed = DockerRegistry(
            folder / "listed",
            "listed.test",
            leaf("listed.test"),
            token_auth_config(self._listed_tokens, realm="https://logins.test/token"),
        )
        self._basic, self._shared = (
            DockerRegistry(
                folder / name,
                f"{name}.test",
                leaf(f"{name}.test"),
                basic_auth_config(folder / f"{name}.htpasswd", users),
            )
            for name in ("basic", "shared")
        )
        self._stored = DockerRegistry(folder / "stored", "stored.test", leaf("stored.test"))
        self._store = SignedURLStore(leaf("store.test").server_context(), self._stored)
        self._redirecting = RedirectingRegistry(
            leaf("redirecting.test").server_context(),
            self._stored,
            self._context,
            f"https://{STORE_HOST}/blobs/{{digest}}?Expires=1&Signature={{signature}}",
        )
        self._stubs = (self._hub_tokens, self._tokens, self._listed_tokens, self._store, self._redirecting)
        self._registries = (self._hub, self._private, self._listed, self._basic, self._shared, self._stored)
        self.internet: RecordingProxy | None = None

    @property
    def addresses(self) -> dict[str, int]:
        """The address of each host: "name:port" to a port of 127.0.0.1."""
        return {
            "registry-1.docker.io:443": self._hub.port,
            "auth.docker.io:443": self._hub_tokens.port,
            "private.test:443": self._private.port,
            "tokens.test:443": self._tokens.port,
            "listed.test:443": self._listed.port,
            "logins.test:443": self._listed_tokens.port,
            "basic.test:443": self._basic.port,
            "shared.test:443": self._shared.port,
            "redirecting.test:443": self._redirecting.port,
            STORE_HOST: self._store.port,
        }

    @property
    def settings(self) -> dict[str, str]:
        """The settings with which the daemon reaches all of them."""
        return {
            "REGISTRIES": "redirecting.test private.test listed.test logins.test basic.test shared.test",
            "AUTH_REGISTRIES": f"shared.test:{USER}:{self.password}",
            "ALLOW_PUSH": "true",
            "UPSTREAM_ADDRESSES": format_upstream_addresses(self.addresses),
            "UPSTREAM_CA_FILE": str(self.ca.ca_file),
        }

    def start(self) -> None:
        self._start()

    def open_internet(self, others: Mapping[str, int]) -> None:
        """Start the proxy that tunnels to the registries, and to `others` (host:port to a port of 127.0.0.1)."""
        # go-containerregistry (crane, cosign) calls Docker Hub index.docker.io.
        self.internet = RecordingProxy({**self.addresses, "index.docker.io:443": self._hub.port, **others})
        self.internet.start()

    def _start(self) -> None:
        for server in self._stubs:
            server.start()
        for program in self._registries:
            program.start()

    def stop(self) -> None:
        if self.internet is not None:
            self.internet.stop()
        self._stop()

    def _stop(self) -> None:
        for server in self._stubs:
            server.stop()
        for program in self._registries:
            program.stop()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop all registries and token servers for the time of the context. Connections to them are refused."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def put_images(self, client: str) -> None:
        """Push an image for `client` to the registry of each source."""
        for source in SOURCES:
            image = build_index(
                {
                    architecture: build_small_image(f"{source.key}/{client}/{architecture}", oci=False, layers=1)
                    for architecture in ("amd64", "arm64")
                },
                oci=False,
            )
            self._put(source, repository_name(source.reference(client)), image)
        image = build_small_image(f"single/{client}", oci=False, layers=1)
        self._put(SOURCES[0], repository_name(pushed_image(client)), image)

    def _put(self, source: Source, name: str, image: SampleImage) -> None:
        registry = {
            "docker.io": self._hub,
            "redirecting.test": self._stored,
            "private.test": self._private,
            "listed.test": self._listed,
            "basic.test": self._basic,
            "shared.test": self._shared,
        }[source.host]
        authorization: str | None = None
        tokens = {
            "docker.io": self._hub_tokens,
            "private.test": self._tokens,
            "listed.test": self._listed_tokens,
        }.get(source.host)
        if tokens is not None:
            if source.has_login:
                tokens.owners[name] = {USER}
            token = tokens.issue_token("the tests", [f"repository:{name}:pull,push"], grant_all=True)
            authorization = f"Bearer {token}"
        elif source.has_login:
            authorization = basic_authorization(USER, self.password)
        push_image(registry, name, "1", image, self._context, authorization)


def login_file(logins: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """Return the content of a docker `config.json` with `logins` (host to user and password)."""
    keys = {"docker.io": ("docker.io", "https://index.docker.io/v1/")}
    return {
        "auths": {
            key: {"auth": basic_authorization(*login).removeprefix("Basic ")}
            for host, login in logins.items()
            for key in keys.get(host, (host,))
        }
    }

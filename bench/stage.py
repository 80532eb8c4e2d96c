"""What is measured: one folder with blobs and a registry that has them, and servers that give them out."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from attrs import evolve, frozen

from bench import docker_registry, tree
from bench.clients import Clients
from bench.content import OCI_MANIFEST, REPOSITORY, SLOW, Resource, make_blob, make_manifest, make_root
from bench.daemon import Ports, command, daemon, fetch_ca
from bench.generator import Generator
from bench.loads import download
from bench.nginx import caching, nginx, origin, static
from bench.pki import Certificate, make_certificate
from bench.scale import SMALL_BLOBS, Scale
from bench.servers import BenchError, Cores, Server, free_port
from bench.table import DIRECT, NGINX, NGINX_LOGGING, PROXY, REGISTRY
from bench.targets import Serving, Target

HOST = "registry.bench.test"
OTHER_HOST = "localhost"
"""A registry's second name: what clients call it that ask for no proxy, and resolve it."""
OWN = "docker-registry.local"

_LARGE = 1024 * 1024  # bytes

NGINX_WORKERS = 2
"""Of the nginx that the daemon, with a worker for each core, is measured beside."""


@frozen
class Hosted(Serving):
    """A registry to push to; `collect` is the command that collects its garbage."""

    collect: list[str]


@frozen
class Filled:
    """A daemon that has everything: through CONNECT, and in plain HTTP as hosted registry and as mirror."""

    proxy: Serving
    hosted: Serving
    mirror: Serving


@frozen
class Static:
    """An nginx that has everything as files: by TLS, by TLS with an access log, and in plain HTTP."""

    tls: Serving
    logging: Serving
    plain: Serving


class Stage:
    """The registry, running, and everything else not started yet. `open` makes one."""

    def __init__(
        self, folder: Path, scale: Scale, clients: Clients, origin_port: int, certificate: Certificate
    ) -> None:
        self.folder = folder
        self.scale = scale
        self.clients = clients
        self.generator = Generator.compile(folder)
        self._origin_port = origin_port
        self._certificate = certificate
        self._started = 0
        self.root = folder / "root"
        make_root(self.root)
        self.big = make_blob(self.root, scale.blob)
        self.small, self.medium = (make_blob(self.root, size) for size in SMALL_BLOBS)
        self.manifest = make_manifest(self.root)
        os.sync()  # or the disk is busy with it beside what is measured first

    @classmethod
    @contextmanager
    def open(cls, scale: Scale, clients: Clients) -> Iterator[Stage]:
        # Debian's /tmp may lie in memory, which is neither what is measured nor large enough.
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("TMPDIR") or "/var/tmp"))
        try:
            certificate, port = make_certificate(folder, [HOST, OTHER_HOST]), free_port()
            stage = cls(folder, scale, clients, port, certificate)
            with stage.registry.server:
                yield stage
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # the registry

    @cached_property
    def registry(self) -> Serving:
        """The registry that everything is pulled from, as clients see it that have no proxy."""
        servers = [origin(self._origin_port, self.root, OCI_MANIFEST, SLOW, self.scale.slow_rate)]
        folder, ports = self.folder / "origin", [self._origin_port]
        server = nginx(folder, self._certificate, servers, ports, workers=NGINX_WORKERS)
        return self._peer(server, DIRECT, self._origin_port)

    def origin_mark(self) -> int:
        """Return the present end of what the registry has noted, for `origin_sent`."""
        return len(self._origin_log())

    def origin_sent(self, mark: int) -> int:
        """Return how many bytes of blobs the registry sent since `mark`."""
        end = time.monotonic() + 2  # it notes a request when that is over, a little after the client has the last byte
        while not (sent := sum(map(int, self._origin_log()[mark:].split()))) and time.monotonic() < end:
            time.sleep(0.02)
        return sent

    def remove(self, resource: Resource) -> None:
        """Have the registry no longer have `resource`."""
        (self.root / resource.path.lstrip("/")).unlink()

    def _origin_log(self) -> str:
        return (self.folder / "origin" / "bytes.log").read_text()

    # the servers

    @contextmanager
    def filled_proxy(self, *, workers: int | None = None, cores: Cores | None = None) -> Iterator[Filled]:
        """Run a daemon, just started, that has everything in its cache, and the large blob in its hosted registry."""
        state, resources = self.folder / "filled", (self.big, self.small, self.medium, self.manifest)
        if not state.exists():
            # By another process: what fetching leaves in the heap would hide how much serving takes.
            with self.proxy(state, workers=1) as serving:
                for resource in resources:
                    self._fetch(serving, resource)
            encoded = self.big.digest.partition(":")[2]
            tree.adopt(state / "registry", REPOSITORY, self.root / self.big.path.lstrip("/"), encoded)
            os.sync()
        ports = Ports()
        with self.proxy(state, ports, workers=workers, cores=cores) as serving:
            for resource in resources:
                if "x-cache: miss" in self._fetch(serving, resource).lower():
                    raise BenchError(f"The daemon does not have {resource.path} in its cache.")
            hosted = Target(PROXY, ports.plain, OWN, ca_file="", through_connect=False)
            mirror = evolve(hosted, port=ports.proxy)
            yield Filled(serving, Serving(serving.server, hosted), Serving(serving.server, mirror))

    @contextmanager
    def empty_proxy(self) -> Iterator[Serving]:
        """Run a daemon with an empty cache, warmed up by one small blob."""
        with self.fresh_state() as state, self.proxy(state) as serving:
            self._fetch(serving, self.small)
            yield serving

    @contextmanager
    def static_nginx(self, *, workers: int = NGINX_WORKERS, cores: Cores | None = None) -> Iterator[Static]:
        """Run an nginx that has everything as files."""
        folder, (tls, logging, plain) = self._fresh_folder("static"), (free_port(), free_port(), free_port())
        servers = [
            static(tls, self.root),
            static(logging, self.root, "access.log combined"),
            static(plain, self.root, tls=False),
        ]
        ports = [tls, logging, plain]
        with nginx(folder, self._certificate, servers, ports, workers=workers, cores=cores) as server:
            found = Static(
                self._peer(server, NGINX, tls),
                self._peer(server, NGINX_LOGGING, logging),
                Serving(server, Target(NGINX, plain, HOST, ca_file="", through_connect=False)),
            )
            for serving in (found.tls, found.logging):
                self._fetch(serving, self.small)
            yield found

    @contextmanager
    def caching_nginx(self) -> Iterator[Serving]:
        """Run an nginx that fetches from the registry and caches, warmed up by one small blob."""
        folder, port = self._fresh_folder("caching"), free_port()
        try:
            servers = [caching(port, self._origin_port, HOST, self._certificate.ca_file)]
            with nginx(folder, self._certificate, servers, [port], workers=NGINX_WORKERS) as server:
                serving = self._peer(server, NGINX, port)
                self._fetch(serving, self.small)
                yield serving
        finally:
            _make_room(folder)

    @contextmanager
    def hosting(self, registry: Path | None = None) -> Iterator[Hosted]:
        """Run a daemon whose hosted registry has what is in `registry`, or nothing."""
        ports = Ports()
        with self.fresh_state() as state:
            settings = {"REGISTRY_DIR": str(registry or state / "registry")}
            with self.proxy(state, ports, settings) as serving:
                target = evolve(serving.target, port=ports.tls, host=OWN, through_connect=False)
                yield Hosted(serving.server, target, command(state, "gc"))

    @contextmanager
    def docker_registry(self, storage: Path | None = None) -> Iterator[Hosted]:
        """Run Debian's docker-registry over what is in `storage`, or nothing."""
        folder, port = self._fresh_folder("docker-registry"), free_port()
        try:
            configuration = docker_registry.configure(folder, port, storage or folder / "storage", self._certificate)
            with docker_registry.serve(folder, configuration, port) as server:
                target = self._peer(server, REGISTRY, port).target
                yield Hosted(server, target, docker_registry.collecting(configuration))
        finally:
            _make_room(folder)

    @contextmanager
    def proxy(
        self,
        state: Path,
        ports: Ports | None = None,
        settings: Mapping[str, str] | None = None,
        *,
        workers: int | None = None,
        cores: Cores | None = None,
    ) -> Iterator[Serving]:
        """Run a daemon that intercepts the registry, its state in `state`; all of its workers serve."""
        folder, ports = self._fresh_folder("proxy"), ports or Ports()
        known = {
            "REGISTRIES": HOST,
            "UPSTREAM_ADDRESSES": f"{HOST}=127.0.0.1:{self._origin_port}",
            "UPSTREAM_CA_FILE": str(self._certificate.ca_file),
        }
        with daemon(folder, state, ports, known | dict(settings or {}), workers=workers, cores=cores) as server:
            for number in range(1, server.workers):
                server.wait_for_output(f"worker {number} serves")
            ca_file = fetch_ca(folder, ports.proxy)
            yield Serving(server, Target(PROXY, ports.proxy, HOST, str(ca_file), through_connect=True))

    @contextmanager
    def fresh_state(self) -> Iterator[Path]:
        """Yield a folder for a daemon's state."""
        state = self._fresh_folder("state")
        try:
            yield state
        finally:
            _make_room(state)

    @property
    def ca_file(self) -> Path:
        """The CA of the registries."""
        return self._certificate.ca_file

    def _peer(self, server: Server, name: str, port: int) -> Serving:
        return Serving(server, Target(name, port, HOST, str(self._certificate.ca_file), through_connect=False))

    def _fresh_folder(self, name: str) -> Path:
        self._started += 1
        return self.folder / f"{name}-{self._started}"

    def _fetch(self, serving: Serving, resource: Resource) -> str:
        """Return the head of the answer."""
        head: str = self.clients.run(1, serving.server, download, serving.target, resource).results[0]
        return head


def _make_room(folder: Path) -> None:
    """Remove the large files below `folder`, which is not used any more. The others go with the stage.

    Where many files were removed, each new one may take a millisecond for the next minutes: ext4, if it has no journal,
    looks for an inode that was not in use lately.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size >= _LARGE:
            path.unlink()

"""The servers of a run: a folder with blobs, the upstream registry that serves them, the daemon, and its peers."""

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

from bench import docker_registry, registry_tree
from bench.clients import ClientPool
from bench.content import OCI_MANIFEST, REPOSITORY, SLOW_REPOSITORY, Resource, create_blob, create_manifest, create_root
from bench.daemon import DaemonPorts, cli_command, fetch_ca, make_daemon
from bench.endpoints import Endpoint, RunningServer
from bench.generator import LoadGenerator
from bench.loads import download
from bench.nginx import caching_server, make_nginx, origin_server, static_server
from bench.pki import ServerCertificate, create_certificate
from bench.scale import SMALL_BLOBS, Scale
from bench.servers import BenchError, BenchServer, CoreAssignment, free_port
from bench.table import DIRECT, NGINX, NGINX_LOGGING, PROXY, REGISTRY

UPSTREAM_HOST = "registry.bench.test"
DIRECT_HOST = "localhost"
"""The registry's second name, which clients without a proxy use, because they have to resolve it."""
HOSTED_REGISTRY_HOST = "docker-registry.local"

_LARGE_FILE_SIZE = 1024 * 1024  # bytes

NGINX_WORKERS = 2
"""Workers of the nginx that is compared with a daemon that has one worker for each core."""


@frozen
class PushableServer(RunningServer):
    """A registry to push to; `gc_command` collects its garbage."""

    gc_command: list[str]


@frozen
class WarmDaemon:
    """A daemon with all content cached: through CONNECT, and over plain HTTP as hosted registry and as mirror."""

    proxy: RunningServer
    hosted: RunningServer
    mirror: RunningServer


@frozen
class StaticNginx:
    """An nginx that serves all content as files: over TLS, over TLS with an access log, and over plain HTTP."""

    tls: RunningServer
    tls_with_log: RunningServer
    plain_http: RunningServer


class Testbed:
    """The content and the configuration of all servers. `open` creates one, with the upstream registry running."""

    def __init__(
        self, folder: Path, scale: Scale, clients: ClientPool, origin_port: int, certificate: ServerCertificate
    ) -> None:
        self.folder = folder
        self.scale = scale
        self.clients = clients
        self.generator = LoadGenerator.compile(folder)
        self._origin_port = origin_port
        self._certificate = certificate
        self._folder_count = 0
        self.root = folder / "root"
        create_root(self.root)
        self.large_blob = create_blob(self.root, scale.large_blob)
        self.small_blob, self.medium_blob = (create_blob(self.root, size) for size in SMALL_BLOBS)
        self.manifest = create_manifest(self.root)
        os.sync()  # otherwise the disk would still write the content during the first benchmark

    @classmethod
    @contextmanager
    def open(cls, scale: Scale, clients: ClientPool) -> Iterator[Testbed]:
        # Debian's /tmp may be in memory, which would hide the cost of the disk, and may be too small.
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("TMPDIR") or "/var/tmp"))
        try:
            certificate, port = create_certificate(folder, [UPSTREAM_HOST, DIRECT_HOST]), free_port()
            testbed = cls(folder, scale, clients, port, certificate)
            with testbed.registry.process:
                yield testbed
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # the registry

    @cached_property
    def registry(self) -> RunningServer:
        """The upstream registry, with the endpoint of clients without a proxy."""
        servers = [origin_server(self._origin_port, self.root, OCI_MANIFEST, SLOW_REPOSITORY, self.scale.slow_rate)]
        folder, ports = self.folder / "origin", [self._origin_port]
        process = make_nginx(folder, self._certificate, servers, ports, workers=NGINX_WORKERS)
        return self._direct_server(process, DIRECT, self._origin_port)

    def origin_log_offset(self) -> int:
        """Return the current end of the registry's log. `origin_bytes_since` takes it."""
        return len(self._read_origin_log())

    def origin_bytes_since(self, log_offset: int) -> int:
        """Return how many bytes of bodies the registry sent since `log_offset`."""
        # nginx logs a request when it is complete, slightly after the client has received the last byte.
        deadline = time.monotonic() + 2
        while True:
            sent_bytes = sum(map(int, self._read_origin_log()[log_offset:].split()))
            if sent_bytes or time.monotonic() >= deadline:
                return sent_bytes
            time.sleep(0.02)

    def remove_resource(self, resource: Resource) -> None:
        """Delete `resource` from the upstream registry."""
        (self.root / resource.path.lstrip("/")).unlink()

    def _read_origin_log(self) -> str:
        return (self.folder / "origin" / "bytes.log").read_text()

    # the servers

    @contextmanager
    def warm_proxy(self, *, workers: int | None = None, cores: CoreAssignment | None = None) -> Iterator[WarmDaemon]:
        """Run a new daemon with all content in its cache, and the large blob in its hosted registry."""
        state, resources = self.folder / "filled", (self.large_blob, self.small_blob, self.medium_blob, self.manifest)
        if not state.exists():
            # Another daemon fills the cache: memory that fetching leaves in the heap would hide the cost of serving.
            with self.proxy(state, workers=1) as server:
                for resource in resources:
                    self.fetch_head(server, resource)
            sha256_hex = self.large_blob.digest.partition(":")[2]
            registry_tree.link_blob(
                state / "registry", REPOSITORY, self.root / self.large_blob.path.lstrip("/"), sha256_hex
            )
            os.sync()
        ports = DaemonPorts()
        with self.proxy(state, ports, workers=workers, cores=cores) as server:
            for resource in resources:
                if "x-cache: miss" in self.fetch_head(server, resource).lower():
                    raise BenchError(f"{resource.path} is not in the daemon's cache.")
            hosted = Endpoint(PROXY, ports.registry_http, HOSTED_REGISTRY_HOST, ca_file="", through_connect=False)
            mirror = evolve(hosted, port=ports.proxy)
            yield WarmDaemon(server, RunningServer(server.process, hosted), RunningServer(server.process, mirror))

    @contextmanager
    def cold_proxy(self) -> Iterator[RunningServer]:
        """Run a daemon with an empty cache, warmed up with one small blob."""
        with self.temporary_state() as state, self.proxy(state) as server:
            self.fetch_head(server, self.small_blob)
            yield server

    @contextmanager
    def static_nginx(
        self, *, workers: int = NGINX_WORKERS, cores: CoreAssignment | None = None
    ) -> Iterator[StaticNginx]:
        """Run an nginx that serves all content as files."""
        folder, (tls, logging, plain) = self._new_folder("static"), (free_port(), free_port(), free_port())
        servers = [
            static_server(tls, self.root),
            static_server(logging, self.root, "access.log combined"),
            static_server(plain, self.root, tls=False),
        ]
        ports = [tls, logging, plain]
        with make_nginx(folder, self._certificate, servers, ports, workers=workers, cores=cores) as process:
            result = StaticNginx(
                self._direct_server(process, NGINX, tls),
                self._direct_server(process, NGINX_LOGGING, logging),
                RunningServer(process, Endpoint(NGINX, plain, UPSTREAM_HOST, ca_file="", through_connect=False)),
            )
            for server in (result.tls, result.tls_with_log):
                self.fetch_head(server, self.small_blob)
            yield result

    @contextmanager
    def caching_nginx(self) -> Iterator[RunningServer]:
        """Run an nginx that fetches from the registry and caches, warmed up with one small blob."""
        folder, port = self._new_folder("caching"), free_port()
        try:
            servers = [caching_server(port, self._origin_port, UPSTREAM_HOST, self._certificate.ca_file)]
            with make_nginx(folder, self._certificate, servers, [port], workers=NGINX_WORKERS) as process:
                server = self._direct_server(process, NGINX, port)
                self.fetch_head(server, self.small_blob)
                yield server
        finally:
            _remove_large_files(folder)

    @contextmanager
    def hosted_registry(self, registry: Path | None = None) -> Iterator[PushableServer]:
        """Run a daemon whose hosted registry has its content in `registry`, or is empty."""
        ports = DaemonPorts()
        with self.temporary_state() as state:
            settings = {"REGISTRY_DIR": str(registry or state / "registry")}
            with self.proxy(state, ports, settings) as server:
                endpoint = evolve(
                    server.endpoint, port=ports.registry_tls, host=HOSTED_REGISTRY_HOST, through_connect=False
                )
                yield PushableServer(server.process, endpoint, cli_command(state, "gc"))

    @contextmanager
    def docker_registry(
        self, storage: Path | None = None, *, settings: Mapping[str, object] | None = None
    ) -> Iterator[PushableServer]:
        """Run Debian's docker-registry with its content in `storage`, or as `settings` say, or empty."""
        folder, port = self._new_folder("docker-registry"), free_port()
        try:
            settings = settings or docker_registry.file_storage(storage or folder / "storage")
            configuration = docker_registry.write_configuration(folder, port, settings, self._certificate)
            with docker_registry.make_server(folder, configuration, port) as process:
                endpoint = self._direct_server(process, REGISTRY, port).endpoint
                yield PushableServer(process, endpoint, docker_registry.garbage_collect_command(configuration))
        finally:
            _remove_large_files(folder)

    @contextmanager
    def proxy(
        self,
        state: Path,
        ports: DaemonPorts | None = None,
        settings: Mapping[str, str] | None = None,
        *,
        workers: int | None = None,
        cores: CoreAssignment | None = None,
    ) -> Iterator[RunningServer]:
        """Run a daemon that intercepts the upstream registry, with its state in `state`; wait for all its workers."""
        folder, ports = self._new_folder("proxy"), ports or DaemonPorts()
        defaults = {
            "REGISTRIES": UPSTREAM_HOST,
            "UPSTREAM_ADDRESSES": f"{UPSTREAM_HOST}=127.0.0.1:{self._origin_port}",
            "UPSTREAM_CA_FILE": str(self._certificate.ca_file),
        }
        with make_daemon(
            folder, state, ports, defaults | dict(settings or {}), workers=workers, cores=cores
        ) as process:
            for number in range(1, process.workers):
                process.wait_for_output(f"worker {number} serves")
            ca_file = fetch_ca(folder, ports.proxy)
            yield RunningServer(
                process, Endpoint(PROXY, ports.proxy, UPSTREAM_HOST, str(ca_file), through_connect=True)
            )

    @contextmanager
    def temporary_state(self) -> Iterator[Path]:
        """Yield a folder for a daemon's state."""
        state = self._new_folder("state")
        try:
            yield state
        finally:
            _remove_large_files(state)

    @property
    def ca_file(self) -> Path:
        """The CA of the registries."""
        return self._certificate.ca_file

    def _direct_server(self, process: BenchServer, server_name: str, port: int) -> RunningServer:
        return RunningServer(
            process, Endpoint(server_name, port, UPSTREAM_HOST, str(self._certificate.ca_file), through_connect=False)
        )

    def _new_folder(self, name: str) -> Path:
        self._folder_count += 1
        return self.folder / f"{name}-{self._folder_count}"

    def fetch_head(self, server: RunningServer, resource: Resource) -> str:
        """Download `resource` and return the head of the response."""
        head: str = self.clients.run(1, server.process, download, server.endpoint, resource).results[0]
        return head


def _remove_large_files(folder: Path) -> None:
    """Remove the large files below `folder`, which is no longer used. The small ones stay until the end of the run.

    After many files were removed, creating a file may take a millisecond for some minutes, because ext4 without a
    journal searches for an inode that was not used recently.
    """
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size >= _LARGE_FILE_SIZE:
            path.unlink()

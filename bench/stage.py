"""What is measured: one folder with a blob and a registry that has it, and servers that give it out."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import evolve, frozen

from bench import docker_registry
from bench.clients import Clients
from bench.loads import Resource, download
from bench.nginx import caching, nginx, static
from bench.pki import Certificate, make_certificate
from bench.scale import SMALL_BLOB, Scale
from bench.servers import BenchError, Server, free_port
from bench.table import NGINX, NGINX_LOGGING, PROXY, REGISTRY
from bench.targets import Target

HOST = "registry.bench.test"
OWN = "docker-registry.local"

_PROJECT = Path(__file__).resolve().parents[1]
_TWISTD = "from twisted.scripts.twistd import run; run()"
_COMMAND = "import sys; sys.path.insert(0, sys.argv.pop(1)); from dockerproxy.cli import main; sys.exit(main())"
_MIB = 1 << 20


@frozen
class Serving:
    """A server that runs, and how clients reach it."""

    server: Server
    target: Target

    @property
    def name(self) -> str:
        return self.target.name


@frozen
class Hosted(Serving):
    """A registry to push to; `collect` is the command that collects its garbage."""

    collect: list[str]


class Stage:
    """The registry, running, and everything else not started yet. `open` makes one."""

    def __init__(
        self, folder: Path, scale: Scale, clients: Clients, origin_port: int, certificate: Certificate
    ) -> None:
        self.folder = folder
        self.scale = scale
        self.clients = clients
        self._origin_port = origin_port
        self._certificate = certificate
        self._filled = False
        self._started = 0
        self.big = _make_blob(folder / "root", scale.blob)
        self.small = _make_blob(folder / "root", SMALL_BLOB)

    @classmethod
    @contextmanager
    def open(cls, scale: Scale, clients: Clients) -> Iterator[Stage]:
        # Debian's /tmp may lie in memory, which is neither what is measured nor large enough.
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("TMPDIR") or "/var/tmp"))
        try:
            certificate, port = make_certificate(folder, HOST), free_port()
            stage = cls(folder, scale, clients, port, certificate)
            log = f"{folder}/origin/bytes.log bytes"
            with nginx(folder / "origin", certificate, [static(port, folder / "root", log)], [port]):
                yield stage
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # the registry

    def origin_mark(self) -> int:
        """Return the present end of what the registry has noted, for `origin_sent`."""
        return len(self._origin_log())

    def origin_sent(self, mark: int) -> int:
        """Return how many bytes of blobs the registry sent since `mark`."""
        end = time.monotonic() + 2  # it notes a request when that is over, a little after the client has the last byte
        while not (sent := sum(map(int, self._origin_log()[mark:].split()))) and time.monotonic() < end:
            time.sleep(0.02)
        return sent

    def _origin_log(self) -> str:
        return (self.folder / "origin" / "bytes.log").read_text()

    # the servers

    @contextmanager
    def filled_proxy(self) -> Iterator[Serving]:
        """Run a daemon, just started, that has both blobs in its cache."""
        if not self._filled:
            # By another process: what fetching leaves in the heap would hide how much serving takes.
            with self._proxy(self.folder / "filled") as serving:
                self._fetch(serving, self.big)
                self._fetch(serving, self.small)
            self._filled = True
        with self._proxy(self.folder / "filled") as serving:
            for blob in (self.big, self.small):
                if "x-cache: miss" in self._fetch(serving, blob).lower():
                    raise BenchError(f"The daemon does not have {blob.path} in its cache.")
            yield serving

    @contextmanager
    def empty_proxy(self) -> Iterator[Serving]:
        """Run a daemon with an empty cache, warmed up by one small blob."""
        state = self.folder / "empty"
        try:
            with self._proxy(state) as serving:
                self._fetch(serving, self.small)
                yield serving
        finally:
            shutil.rmtree(state, ignore_errors=True)

    @contextmanager
    def static_nginx(self) -> Iterator[tuple[Serving, Serving]]:
        """Run an nginx that has the blobs as files: without an access log, and with one."""
        folder, (plain, logging) = self._fresh_folder("static"), (free_port(), free_port())
        root = self.folder / "root"
        servers = [static(plain, root, "off"), static(logging, root, "access.log combined")]
        with nginx(folder, self._certificate, servers, [plain, logging]) as server:
            found = tuple(self._peer(server, name, port) for name, port in ((NGINX, plain), (NGINX_LOGGING, logging)))
            for serving in found:
                self._fetch(serving, self.small)
            yield found[0], found[1]

    @contextmanager
    def caching_nginx(self) -> Iterator[Serving]:
        """Run an nginx that fetches from the registry and caches, warmed up by one small blob."""
        folder, port = self._fresh_folder("caching"), free_port()
        try:
            servers = [caching(port, self._origin_port, HOST, self._certificate.ca_file)]
            with nginx(folder, self._certificate, servers, [port]) as server:
                serving = self._peer(server, NGINX, port)
                self._fetch(serving, self.small)
                yield serving
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def hosting(self, registry: Path | None = None) -> Iterator[Hosted]:
        """Run a daemon whose hosted registry has what is in `registry`, or nothing."""
        state, port = self._fresh_folder("state"), free_port()
        collect = [sys.executable, "-c", _COMMAND, str(_PROJECT), "gc", "--socket", f"{state}/run/control.sock"]
        try:
            with self._proxy(state, port, registry or state / "registry") as serving:
                target = evolve(serving.target, port=port, host=OWN, through_connect=False)
                yield Hosted(serving.server, target, collect)
        finally:
            shutil.rmtree(state, ignore_errors=True)

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
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _proxy(self, state: Path, registry_port: int = 0, registry: Path | None = None) -> Iterator[Serving]:
        port, folder = free_port(), self._fresh_folder("proxy")
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
        environment |= {
            "PYTHONPATH": str(_PROJECT),
            "STATE_DIR": str(state),
            "PROXY_LISTEN": f"tcp:{port}:interface=127.0.0.1",
            "REGISTRY_LISTEN": f"tcp:{registry_port or free_port()}:interface=127.0.0.1",
            "REGISTRY_DIR": str(registry or state / "registry"),
            "REGISTRIES": HOST,
            "UPSTREAM_ADDRESSES": f"{HOST}=127.0.0.1:{self._origin_port}",
            "UPSTREAM_CA_FILE": str(self._certificate.ca_file),
            "WORKERS": "1",
        }
        argv = [sys.executable, "-c", _TWISTD, "--nodaemon", "--pidfile=", "dockerproxy"]
        with Server(argv, folder, environment, [port]) as server:
            ca_file = folder / "ca.crt"
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://127.0.0.1:{port}/ca.crt", timeout=10
            ) as answer:
                ca_file.write_bytes(answer.read())
            yield Serving(server, Target(PROXY, port, HOST, str(ca_file), through_connect=True))

    def _peer(self, server: Server, name: str, port: int) -> Serving:
        return Serving(server, Target(name, port, HOST, str(self._certificate.ca_file), through_connect=False))

    def _fresh_folder(self, name: str) -> Path:
        self._started += 1
        return self.folder / f"{name}-{self._started}"

    def _fetch(self, serving: Serving, blob: Resource) -> str:
        """Return the head of the answer."""
        head: str = self.clients.run(1, serving.server, download, serving.target, blob).results[0]
        return head


def _make_blob(root: Path, size: int) -> Resource:
    """Put `size` bytes where a registry has them: below `root`, under their digest."""
    folder = root / "v2/bench/blob/blobs"
    folder.mkdir(parents=True, exist_ok=True)
    piece, hasher, draft = os.urandom(min(size, _MIB)), hashlib.sha256(), folder / "draft"
    with draft.open("wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)
            hasher.update(piece)
    name = f"sha256:{hasher.hexdigest()}"
    draft.rename(folder / name)
    return Resource(f"/v2/bench/blob/blobs/{name}", size)

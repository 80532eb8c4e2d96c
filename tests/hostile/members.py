"""Hostile members of a fleet, and a daemon that has only these beside it.

Each hostile member has an attack, and one content for which it answers with that. It is the owner of this content.
"""

from __future__ import annotations

import itertools
import json
import selectors
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import define, frozen

from dockerproxy.fleet.members import ordered
from tests.e2e.harness.fleet import MemberDaemon
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.images import OCI_MANIFEST, TypedContent, random_bytes, sha256_digest
from tests.e2e.harness.pki import UpstreamCA
from tests.hostile.conftest import GOOD, HostileNetwork

SIZE = 300_000
"""The bytes of each content: too many to be read as a whole before they are passed on."""

ADDRESS = "127.0.0.21"
"""The address of the hostile members, each of which has a port of its own."""

LOGIN = basic_authorization("alice", "wonderland")  # which makes a member's answer come over TLS

_TAIL = random_bytes(SIZE - 8, "hostile members")


@define
class Hit:
    """A request to a hostile member. `data` is the right content."""

    connection: socket.socket
    head: bytes
    data: bytes

    def send(self, *parts: str | bytes) -> None:
        self.connection.sendall(b"".join(part.encode() if isinstance(part, str) else part for part in parts))

    def answer(self, status: int = 200, *fields: str, body: bytes = b"", word: str = "upstream") -> None:
        """Send an answer that has the form of HTTP. Each of `fields` is a line."""
        lines = [f"HTTP/1.1 {status} X", *([f"X-Fleet-Answer: {word}"] if word else []), *fields]
        self.send("\r\n".join(lines), "\r\n\r\n", body)

    def wait(self) -> None:
        """Say nothing until the other side has left."""
        with suppress(OSError):
            while self.connection.recv(65536):
                pass


Attack = Callable[[Hit], None]
"""Answers a request. The connection is closed afterwards."""

Tunnel = Callable[["HostileMember", socket.socket], "socket.socket | None"]
"""Answers CONNECT. Returns the connection on which the request comes then, None if there is none."""


class HostileMember:
    """A listening socket that answers requests for `data` with `attack`, and all others with a refusal of its own."""

    def __init__(self, attack: Attack, address: str = ADDRESS, port: int = 0, tunnel: Tunnel | None = None) -> None:
        self.data, self.digest = b"", "no content"
        self.contexts: Mapping[str, ssl.SSLContext] = {}
        self.requests: list[bytes] = []
        """The heads of the requests for `data`."""
        self.ended = threading.Event()
        """Set when the first attack has ended: all is sent, or the daemon has left."""
        self.listener = socket.create_server((address, port), backlog=50)
        self.name = f"{address}:{self.listener.getsockname()[1]}"
        self._attack = attack
        self._tunnel: Tunnel = tunnel or accept_tunnel

    def serve(self, connection: socket.socket) -> None:
        """Answer a request on a new connection. Blocks."""
        with suppress(OSError), connection:
            connection.settimeout(20)
            head = _read_head(connection)
            stream: socket.socket | None = connection
            if head.startswith(b"CONNECT "):
                stream = self._tunnel(self, connection)
                head = b"" if stream is None else _read_head(stream)
            if stream is None or not head:
                return
            with stream:
                self._respond(Hit(stream, head, self.data))

    def _respond(self, hit: Hit) -> None:
        if self.digest.encode() not in hit.head:
            hit.answer(504, "Content-Length: 0", word="own")
            return
        self.requests.append(hit.head)
        try:
            self._attack(hit)
        finally:
            self.ended.set()


def accept_tunnel(member: HostileMember, connection: socket.socket, certificate: str = "good") -> socket.socket:
    """Become the registry behind a CONNECT."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    return member.contexts[certificate].wrap_socket(connection, server_side=True)


def _read_head(connection: socket.socket) -> bytes:
    """Return the bytes up to the end of a head; nothing if the connection ends before."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b""
        data += piece
    return data


@contextmanager
def listening(members: Sequence[HostileMember]) -> Iterator[None]:
    """Accept the connections of all `members` in one thread. Each connection has a thread of its own."""
    wake, waker = socket.socketpair()
    selector = selectors.DefaultSelector()
    selector.register(wake, selectors.EVENT_READ)
    for member in members:
        selector.register(member.listener, selectors.EVENT_READ, member)

    def accept() -> None:
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    return
                connection, _ = key.data.listener.accept()
                threading.Thread(target=key.data.serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        waker.send(b"x")
        thread.join(20)
        for one in (selector, wake, waker, *(member.listener for member in members)):
            one.close()


@frozen
class Target:
    """The content of a hostile member: a ``blob`` in the clear, a ``login`` (a blob over TLS), or a ``manifest``."""

    kind: str
    member: HostileMember
    repository: str

    @property
    def url(self) -> str:
        resource = "manifests" if self.kind == "manifest" else "blobs"
        return f"{GOOD}/v2/{self.repository}/{resource}/{self.member.digest}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": LOGIN} if self.kind == "login" else {"Accept": OCI_MANIFEST}


@define
class HostileFleet:
    """A daemon, and the registry that it proxies. `targets` are those of the hostile members, in their order."""

    daemon: MemberDaemon
    network: HostileNetwork
    targets: list[Target]


@contextmanager
def running_fleet(
    folder: Path, workers: int, members: Sequence[tuple[str, HostileMember]], **settings: str
) -> Iterator[HostileFleet]:
    """Run a daemon in a fleet of hostile members, each with the kind of its content. Its log has no traceback."""
    network = HostileNetwork(folder / "network")
    common = {
        **network.settings, "WORKERS": str(workers), "FLEET_TIMEOUT": "1s", "CA_DIR": str(folder / "ca"), **settings,
    }  # fmt: skip
    daemon = MemberDaemon(folder / "member", 0, common)
    names = tuple(sorted([daemon.name, *(member.name for _, member in members)]))
    daemon.set_fleet(names)
    try:
        with listening([member for _, member in members]):
            daemon.start()
            contexts, targets = _make_contexts(folder), []
            blobs = _blobs_by_owner(names, {member.name for kind, member in members if kind != "manifest"})
            for kind, member in members:
                member.contexts, repository = contexts, "team/app"
                if kind == "manifest":
                    repository = _put_manifest(network, names, member)
                else:
                    member.data = blobs[member.name]
                    member.digest = network.good.put_blob(repository, member.data)
                targets.append(Target(kind, member, repository))
            yield HostileFleet(daemon, network, targets)
            daemon.check_log([])
    finally:
        if daemon.running:
            daemon.kill()
        network.stop()


def _make_contexts(folder: Path) -> dict[str, ssl.SSLContext]:
    fleet = UpstreamCA.from_files(folder / "ca" / "ca.crt", folder / "ca" / "ca.key", folder / "leaves")
    other = UpstreamCA(folder / "other", "another CA")
    return {
        "good": fleet.leaf("good.test").server_context(),
        "another registry": fleet.leaf("evil.test").server_context(),
        "expired": fleet.leaf("good.test", valid_days=-1).server_context(),
        "another CA": other.leaf("good.test").server_context(),
    }


def _put_manifest(network: HostileNetwork, names: tuple[str, ...], member: HostileMember) -> str:
    """Put a manifest into a repository of which `member` owns the manifests. Return the repository."""
    repositories = (f"team/app{number}" for number in itertools.count())
    repository = next(one for one in repositories if ordered(f"good.test/{one}", names)[0] == member.name)
    annotations = {"repository": repository, "padding": ""}
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "annotations": annotations}
    annotations["padding"] = "a" * (SIZE - len(json.dumps(document)))
    member.data = json.dumps(document).encode()
    member.digest = sha256_digest(member.data)
    network.good.put_manifest(repository, member.digest, TypedContent(OCI_MANIFEST, member.data))
    return repository


def _blobs_by_owner(names: tuple[str, ...], owners: set[str]) -> dict[str, bytes]:
    """Return a blob for each of `owners`."""
    blobs: dict[str, bytes] = {}
    for number in itertools.count():
        if blobs.keys() == owners:
            break
        data = b"%08d" % number + _TAIL
        owner = ordered(sha256_digest(data), names)[0]
        if owner in owners:
            blobs.setdefault(owner, data)
    return blobs

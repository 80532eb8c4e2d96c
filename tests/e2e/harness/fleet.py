"""A fleet of real daemons on this machine. Each has an address of its own for the other members.

Clients come from 127.0.0.1, which is the address of no member.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen
from cryptography.hazmat.primitives import serialization

from bench.servers import free_port
from dockerproxy.fleet.hop import HopProofs, parse_hop
from dockerproxy.fleet.members import ordered
from tests.e2e.harness.daemon import TwistdDaemon, start_members
from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.upstreams import Upstreams, format_upstream_addresses


class MemberDaemon(TwistdDaemon):
    """A member. `name` is its entry in FLEET."""

    def __init__(self, folder: Path, number: int, settings: dict[str, str]) -> None:
        super().__init__(folder, {"WORKERS": "1", **settings})
        self.name = f"127.0.0.{10 + number}:{self.port}"
        listen = f"tcp:{self.port}:interface=127.0.0.1 tcp:{self.port}:interface=127.0.0.{10 + number}"
        self.environment |= {"PROXY_LISTEN": listen, "FLEET_ADDRESS": self.name}
        self._file = folder / "environment"
        self.argv.append(f"--env-file={self._file}")

    def set_fleet(self, names: Iterable[str]) -> None:
        """Write FLEET into the daemon's environment file, which it reads at its start and at each reload."""
        self._file.write_text(f'FLEET="{" ".join(names)}"\n')


def hop_fields(ca_folder: Path, hop: str, receiver: str, path: str) -> dict[str, str]:
    """Return the fields of a member's GET of `path`, which may have a query, at `receiver`."""
    key = serialization.load_pem_private_key((ca_folder / "ca.key").read_bytes(), None)
    content = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    secret = hmac.digest(content, b"docker-registry-proxy fleet", "sha256")
    parsed = parse_hop(hop)
    assert parsed is not None and str(parsed) == hop, "the form of the field has changed"
    return {"CDN-Loop": hop, "X-Fleet-Proof": HopProofs(secret).make(parsed, receiver, "GET", path.partition("?")[0])}


@frozen
class Pull:
    """The outcome of one client's pull of a blob: its digest and size as received, and the attempts that it took."""

    digest: str
    size: int
    attempts: int


@frozen
class DaemonFleet:
    """The members, in no particular order."""

    members: Sequence[MemberDaemon]

    def owner_first(self, key: str) -> list[MemberDaemon]:
        """Return the members in the order in which they are asked for `key`."""
        by_name = {member.name: member for member in self.members}
        return [by_name[name] for name in ordered(key, tuple(sorted(by_name)))]


@contextmanager
def running_fleet(
    folder: Path,
    upstreams: Upstreams,
    size: int,
    lists: Sequence[Sequence[int]] | None = None,
    *,
    cut_off: str | None = None,
    **settings: str,
) -> Iterator[DaemonFleet]:
    """Run `size` members. `lists` gives the numbers of the members that each one knows; by default they know all.

    The owner of the key `cut_off` cannot reach `FAKE`.
    """
    common = {**upstreams.settings, "CA_DIR": str(folder / "ca"), "FLEET_TIMEOUT": "2s", **settings}
    members = [MemberDaemon(folder / f"member{number}", number, common) for number in range(size)]
    for number, member in enumerate(members):
        known = range(size) if lists is None else lists[number]
        member.set_fleet(members[one].name for one in known)
    if cut_off is not None:
        unreachable = DaemonFleet(members).owner_first(cut_off)[0]
        addresses = {**upstreams.addresses, "fake.test:443": free_port()}
        unreachable.environment["UPSTREAM_ADDRESSES"] = format_upstream_addresses(addresses)
    try:
        start_members(members)
        yield DaemonFleet(members)
        for member in members:
            member.check_log(upstreams.secrets)
    finally:
        for member in members:
            if member.running:
                member.kill()


def pull_blob(member: TwistdDaemon, url: str, *, attempts: int = 1, **headers: str) -> Pull:
    """Read a blob through `member`. A broken pull is repeated, as docker does."""
    for attempt in range(1, attempts + 1):
        checksum, size = hashlib.sha256(), 0
        try:
            with member.client.stream("GET", url, headers) as response:
                assert response.status == 200, (response.status, response.read(500))
                while data := response.read(256 * 1024):
                    checksum.update(data)
                    size += len(data)
            return Pull(f"sha256:{checksum.hexdigest()}", size, attempt)
        except Exception:
            if attempt == attempts:
                raise
    raise AssertionError("no attempt")


@contextmanager
def pulls(tasks: Sequence[tuple[TwistdDaemon, str]], **options: Any) -> Iterator[list[Future[Pull]]]:
    """Pull the blobs at the same time."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        yield [pool.submit(pull_blob, member, url, **options) for member, url in tasks]


def upstream_bytes(fake: FakeRegistry, digest: str) -> int:
    """Return the bytes of the blob that upstream has sent in all."""
    return sum(request.sent_bytes for request in fake.find_requests("GET", digest))

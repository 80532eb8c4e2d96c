"""A thousand members in one process: the real clients, trees and waits over a network in memory.

Each member has a cache of one blob that knows only how many bytes it has. Time is a clock; each step moves a piece from
each sender to each of its receivers.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater

from dockerproxy.cache.upstream import UpstreamResponse
from dockerproxy.errors import UpstreamBroken, UpstreamError, UpstreamUnreachable
from dockerproxy.fleet.hop import Hop, HopKind
from dockerproxy.fleet.members import Members, blob_key, ordered
from dockerproxy.fleet.question import Question
from dockerproxy.fleet.relays import Relays
from dockerproxy.fleet.upstream import FleetUpstream, MemberClient
from dockerproxy.fleet.waits import Waits
from dockerproxy.http.headers import Headers
from dockerproxy.oci.names import Digest, Registry, parse_repository
from dockerproxy.thread_pool import ContentParser
from dockerproxy.upstream.credentials import Anonymous
from dockerproxy.upstream.registry_request import RegistryRequest

REGISTRY, NAME = Registry.parse("registry.example"), parse_repository("library/app")
DIGEST = Digest.of(b"the blob of a thousand members")
PATH = f"/v2/{NAME}/blobs/{DIGEST}"
PIECES = 20  # of the blob; a step moves one
PIECE = bytes(1 << 20)
STEP = 0.1  # seconds
FAN_OUT = 8


class Pieces:
    """The body of a response, from piece `start` on of the pieces of `source`."""

    sender: Any = None

    def __init__(self, network: Network, source: Node | None, start: int, fields: dict[str, str], status: int) -> None:
        size, offset, length = PIECES * len(PIECE), start * len(PIECE), (PIECES - start) * len(PIECE)
        if status == 206:
            fields = {**fields, "content-range": f"bytes {offset}-{size - 1}/{size}"}
        self.status, self.headers, self.length = status, Headers(fields.items()), length if status == 206 else 0
        self._network, self._source, self._position = network, source, start

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        waited = 0.0
        while True:
            await deferLater(self._network.clock, STEP)
            waited += STEP
            if self._source is not None and not self._source.is_alive:
                raise UpstreamBroken("reset")
            if self._position == PIECES:
                return []
            if self._source is None or self._source.pieces > self._position:
                self._position += 1
                return [PIECE]
            if waited > 5:
                raise UpstreamBroken("silent for FLEET_TIMEOUT")

    async def discard(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""


def first_piece(headers: Headers) -> int:
    return int((headers.get("range") or "bytes=0-")[6:-1]) // len(PIECE)


class Node:
    """A member, its cache and its door."""

    def __init__(self, network: Network, name: str, names: list[str]) -> None:
        self.network, self.name = network, name
        self.pieces, self.is_alive, self.is_loading = 0, True, False
        self.copies = Counter[str]()
        clock = network.clock
        self.members = Members(clock.seconds)
        self.members.use(names, name)
        self.waits, self.relays = Waits(clock, None), Relays(FAN_OUT, clock.seconds)
        client = MemberClient(clock, self.members, network, self.waits, network, network.parser, 1 << 40)
        self.client = FleetUpstream(network, self.members, client)

    async def load(self) -> None:
        """Get the blob, as `ResumableGet` and `BlobDownload` do: over several connections if necessary."""
        if self.is_loading:
            return
        self.is_loading = True
        while self.pieces < PIECES and self.is_alive:
            fields = Headers([("range", f"bytes={self.pieces * len(PIECE)}-")])
            try:
                response = await self.client.request(
                    RegistryRequest("GET", REGISTRY, PATH, name=NAME, credential=Anonymous(), headers=fields)
                )
                while self.is_alive and await response.read_pieces(1, 0.0):
                    self.pieces += 1
                response.abort()
            except UpstreamError:
                await deferLater(self.network.clock, 0.2)

    async def serve(self, question: Question, hop: Hop) -> Pieces:
        """Answer a member, as `FleetDoor` does."""
        start = first_piece(question.headers)
        if self.waits.member(question.wait_key) == hop.sender:
            return Pieces(self.network, self, 0, {"x-fleet-answer": "own"}, 508)
        if hop.kind in (HopKind.OWNER, HopKind.LAST):
            key, has_failed = blob_key(DIGEST), hop.kind is HopKind.LAST
            successor = self.members.successor(key)
            relay = self.relays.place(key, hop.sender, has_failed=has_failed, successor=successor)
            if relay is not None and not self.members.is_down(relay):
                return Pieces(self.network, self, 0, {"x-fleet-answer": "own", "x-fleet-relay": relay}, 307)
            Deferred.fromCoroutine(self.load())
        elif not self.is_loading:
            return Pieces(self.network, self, 0, {"x-fleet-answer": "own"}, 504)
        self.copies[hop.sender] += 1
        return Pieces(self.network, self, start, {"x-fleet-answer": "upstream"}, 206)


class Network:
    """Upstream, and the network of the members."""

    def __init__(self, size: int) -> None:
        self.clock = Clock()
        self.parser = ContentParser(None)  # type: ignore[arg-type]  # there are no manifests
        names = [f"10.0.{number // 250}.{number % 250}:3128" for number in range(size)]
        self.nodes = {name: Node(self, name, names) for name in names}
        self.transfers: list[int] = []  # the first piece of each

    async def request(self, request: RegistryRequest) -> UpstreamResponse:
        start = first_piece(request.headers)
        self.transfers.append(start)
        return Pieces(self, None, start, {}, 206)  # type: ignore[return-value]

    async def ask(self, member: str, question: Question, hop: Hop) -> UpstreamResponse:
        await deferLater(self.clock, 0.001)
        node = self.nodes[member]
        if not node.is_alive:
            raise UpstreamUnreachable("refused", "refused")
        return await node.serve(question, hop)  # type: ignore[return-value]

    def count_peer_bytes(self, direction: str, size: int) -> None:
        """Do nothing."""

    def run(self, seconds: float, kill: dict[int, list[str]] | None = None) -> None:
        """Let all members load the blob. `kill` has the members that die at a step."""
        for node in self.nodes.values():
            Deferred.fromCoroutine(node.load())
        for step in range(int(seconds / STEP)):
            for name in (kill or {}).get(step, ()):
                self.nodes[name].is_alive = False
            self.clock.advance(STEP / 2)
            self.clock.advance(STEP / 2)
            if all(node.pieces == PIECES for node in self.nodes.values() if node.is_alive):
                return

    @property
    def owner(self) -> str:
        return ordered(blob_key(DIGEST), tuple(sorted(self.nodes)))[0]

    def most_copies(self) -> int:
        """Return the largest number of members to which one has sent the blob."""
        return max(len(node.copies) for node in self.nodes.values())


@pytest.mark.slow
def test_a_thousand_members_get_a_blob_by_one_transfer() -> None:
    network = Network(1000)
    network.run(60)
    assert all(node.pieces == PIECES for node in network.nodes.values())
    assert network.transfers == [0]
    assert network.most_copies() <= FAN_OUT
    assert network.clock.seconds() < 20  # four steps from the owner


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_tenth_of_them_may_die_meanwhile(seed: int) -> None:
    """Members that lose their relay are placed elsewhere, never more than FLEET_FAN_OUT at one."""
    network, chance = Network(1000), random.Random(seed)
    victims = chance.sample(sorted(set(network.nodes) - {network.owner}), 100)
    network.run(200, {step: victims[step * 10 : step * 10 + 10] for step in range(10)})
    living = [node for node in network.nodes.values() if node.is_alive]
    assert all(node.pieces == PIECES for node in living) and len(living) == 900
    assert network.transfers == [0]
    assert most_living(network) <= FAN_OUT


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_the_owner_and_others_may_die(seed: int) -> None:
    """The successor continues the transfer at once, and sends it on to those that got it from the owner."""
    network, chance = Network(1000), random.Random(seed)
    victims = chance.sample(sorted(set(network.nodes) - {network.owner}), 99)
    network.run(200, {9: [network.owner], 10: victims})
    living = [node for node in network.nodes.values() if node.is_alive]
    assert all(node.pieces == PIECES for node in living) and len(living) == 900
    assert sum(PIECES - start for start in network.transfers) <= 3 * PIECES
    assert most_living(network) <= 2 * FAN_OUT  # in the tree of the owner, and in those after it


def test_the_successor_takes_over_at_once() -> None:
    network = Network(60)
    network.run(200, {8: [network.owner]})
    assert all(node.pieces == PIECES for node in network.nodes.values() if node.is_alive)
    assert len(network.transfers) == 2 and network.transfers[1] > 0
    assert network.most_copies() <= FAN_OUT
    assert network.clock.seconds() < 5  # nobody waits for FLEET_TIMEOUT


def most_living(network: Network) -> int:
    """Return the largest number of living members to which one has sent the blob."""
    return max(sum(network.nodes[name].is_alive for name in node.copies) for node in network.nodes.values())

"""Daemons that are one registry: members of a fleet with a bucket in common, and a balancer in front of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path

from attrs import frozen

from bench.servers import free_port
from tests.e2e.harness.daemon import start_members
from tests.e2e.harness.registry_daemon import RegistryDaemon


class BucketNode(RegistryDaemon):
    """A member of the fleet. `name` is its entry in FLEET, with an address that no client has."""

    def __init__(self, folder: Path, number: int, settings: Mapping[str, str]) -> None:
        super().__init__(folder, {"WORKERS": "1", **settings})
        address = f"127.0.0.{20 + number}"
        self.name = f"{address}:{self.port}"
        listen = f"tcp:{self.port}:interface=127.0.0.1 tcp:{self.port}:interface={address}"
        self.environment |= {"PROXY_LISTEN": listen, "FLEET_ADDRESS": self.name}


class RoundRobin:
    """A TCP balancer on `port`. Each connection goes to the next of `ports` that accepts it."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.port = free_port()
        self._ports = ports
        self._turns = cycle(ports)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def run(self) -> Iterator[RoundRobin]:
        """Run the balancer for the time of the context."""
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", self.port), self._loop
        ).result()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(server.close)
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in self._ports:
            with suppress(OSError):
                node_reader, node_writer = await asyncio.open_connection("127.0.0.1", next(self._turns))
                break
        else:
            writer.transport.abort()
            return
        await asyncio.gather(_copy(reader, node_writer), _copy(node_reader, writer))


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on all bytes, and then the end, however it comes."""
    try:
        while data := await reader.read(256 * 1024):
            writer.write(data)
            await writer.drain()
        writer.close()
    except OSError:
        writer.transport.abort()


@frozen
class BucketFleet:
    """The members, and the balancer."""

    nodes: Sequence[BucketNode]
    balancer: RoundRobin


@contextmanager
def running_bucket_fleet(folder: Path, size: int, settings: Mapping[str, str]) -> Iterator[BucketFleet]:
    """Run `size` members with a balancer. Check their logs at the end."""
    common = {"CA_DIR": str(folder / "ca"), "FLEET_TIMEOUT": "2s", **settings}
    nodes = [BucketNode(folder / f"node{number}", number, common) for number in range(size)]
    for node in nodes:
        node.environment["FLEET"] = " ".join(one.name for one in nodes)
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.kill)
        start_members(nodes)
        yield BucketFleet(nodes, stack.enter_context(RoundRobin([node.http_port for node in nodes]).run()))
        for node in nodes:
            node.check_log([settings.get("AWS_SECRET_ACCESS_KEY", "no secret")])

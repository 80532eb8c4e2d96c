"""The measures of the hosted registry, beside Debian's docker-registry: what is pushed, and what garbage costs."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.asking import answer, ask, connect, push_blob, with_digest
from bench.loads import Start
from bench.measures import note_bytes, note_count, tell, turned
from bench.servers import BenchError
from bench.stage import Hosted, Stage
from bench.table import Table
from bench.targets import Target
from bench.tree import REPOSITORY, grow

_PIECE = 1 << 20
_CHUNK = 32 * 1024  # of the chunked coding: what io.Copy reads at once, by which docker and others in Go send
_LAYERS, _LAYER = 200, 10_000  # small layers, and the bytes of each
_PUSHERS = 5  # docker pushes so many layers at a time
_BETWEEN = 0.005  # seconds between two requests of the client that waits beside a garbage collection


def push(stage: Stage, table: Table) -> None:
    """A large layer, and many small ones."""
    for round_ in range(stage.scale.rounds):
        for run in turned(round_, [_ours, _theirs]):
            with run(stage) as serving:
                case = "1 layer"
                tell("push", case, serving.name)
                load = stage.clients.run(1, serving.server, push_large, serving.target, stage.scale.blob)
                note_bytes(table, "push", case, serving, load, stage.scale.blob)
                case = f"{_LAYERS} small layers"
                tell("push", case, serving.name)
                load = stage.clients.run(_PUSHERS, serving.server, push_small, serving.target, _LAYERS // _PUSHERS)
                note_count(table, "push", case, serving, load, _LAYERS, "layer")


def gc(stage: Stage, table: Table) -> None:
    """A garbage collection, and how long requests wait beside it: once, since it takes its time to litter."""
    for run in (_ours, _theirs):
        folder = stage.folder / "garbage"
        digest, garbage = grow(folder, stage.scale.gc_blobs)
        try:
            with run(stage, folder) as serving:
                case = f"{stage.scale.gc_blobs:,} blobs"
                tell("gc", case, serving.name)
                used, began = serving.server.cpu() + _children(), time.monotonic()
                waits = sorted(_collect(serving, digest))
                took = time.monotonic() - began
                used = serving.server.cpu() + _children() - used
        finally:
            left = _count(folder)
            shutil.rmtree(folder)
        if left != stage.scale.gc_blobs - garbage:
            raise BenchError(f"{left} blobs are left of those that {serving.name} had to look through.")
        table.add("gc", case, serving.name, "duration", "s", took)
        table.add("gc", case, serving.name, "CPU", "s", used)
        table.add("gc", case, serving.name, "wait, 99 %", "ms", waits[int(0.99 * len(waits))] * 1000)
        table.add("gc", case, serving.name, "longest wait", "ms", waits[-1] * 1000)


PUSH_MEASURES: dict[str, Callable[[Stage, Table], None]] = {"push": push, "gc": gc}


@contextmanager
def _ours(stage: Stage, folder: Path | None = None) -> Iterator[Hosted]:
    with stage.hosting(folder) as serving:
        yield serving


@contextmanager
def _theirs(stage: Stage, folder: Path | None = None) -> Iterator[Hosted]:
    with stage.docker_registry(folder) as serving:
        yield serving


def _collect(serving: Hosted, digest: str) -> list[float]:
    """Collect garbage; return the times, in seconds, that a client waited for a manifest meanwhile."""
    waits, connection = [], connect(serving.target)
    with subprocess.Popen(serving.collect, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as collecting:
        while collecting.poll() is None:
            began = time.monotonic()
            ask(connection, 200, "GET", f"/v2/{REPOSITORY}/manifests/{digest}")
            waits.append(time.monotonic() - began)
            time.sleep(_BETWEEN)
        assert collecting.stderr is not None
        if collecting.returncode:
            raise BenchError(f"The garbage collection failed:\n{collecting.stderr.read()[-2000:]}")
    connection.close()
    return waits


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _count(folder: Path) -> int:
    """Return how many of the blobs that `grow` made, manifests and the configuration aside, are there."""
    files = (folder / "docker/registry/v2/blobs/sha256").glob("*/*/data")
    return sum(file.read_bytes().startswith((b"needed", b"garbage")) for file in files)


# the clients' jobs


def push_large(start: Start, target: Target, size: int) -> None:
    """Push a layer of `size` bytes as docker does: its length is not told, it comes in chunks."""
    piece, hasher = os.urandom(_PIECE), hashlib.sha256()
    for _ in range(size // _PIECE):
        hasher.update(piece)
    chunks = [b"%x\r\n%b\r\n" % (_CHUNK, piece[at : at + _CHUNK]) for at in range(0, _PIECE, _CHUNK)]
    connection = connect(target)
    start()
    location = ask(connection, 202, "POST", "/v2/bench/large/blobs/uploads/")
    connection.putrequest("PATCH", location)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    for _ in range(size // _PIECE):
        for chunk in chunks:
            connection.send(chunk)
    connection.send(b"0\r\n\r\n")
    location = answer(connection, 202, "PATCH")
    ask(connection, 201, "PUT", with_digest(location, hasher.hexdigest()))
    connection.close()


def push_small(start: Start, target: Target, count: int) -> None:
    """Push `count` small layers one after the other, each looked for before."""
    layers = [os.urandom(_LAYER) for _ in range(count)]
    connection = connect(target)
    start()
    for layer in layers:
        push_blob(connection, "bench/small", layer, hashlib.sha256(layer).hexdigest())
    connection.close()

"""The measures of what is not cached: for one client, for several or very many at once, and for those that join."""

from __future__ import annotations

from contextlib import ExitStack

from bench.content import Resource, make_blob
from bench.hits import MANY
from bench.measures import clients, note_bytes, tell, turned
from bench.stage import Stage
from bench.table import DIRECT, NGINX, PROXY, Table
from bench.targets import Serving

JOINING = 20

_COLD = 64 * 1024  # bytes
_MS = 1000


def miss(stage: Stage, table: Table) -> None:
    """A large blob: by one client, and by several that ask for it at the same moment."""
    for count in (1, MANY):
        case = clients(count)
        for round_ in range(stage.scale.rounds):
            for serve in turned(round_, [stage.empty_proxy, stage.caching_nginx]):
                with serve() as serving:
                    tell("miss", case, serving.name)
                    mark = stage.origin_mark()
                    done = stage.generator.ask(serving, [stage.big.path], connections=count, count=1)
                    note_bytes(table, "miss", case, serving, done, done.bytes)
                    table.add("miss", case, serving.name, "from upstream", "blobs", _copies(stage, mark, stage.big))


def first(stage: Stage, table: Table) -> None:
    """The time to the first byte of small blobs, one after the other on one connection, over fetching directly."""
    case = "64 KiB, cold"
    for round_ in range(stage.scale.rounds):
        blobs = [make_blob(stage.root, _COLD) for _ in range(stage.scale.cold_blobs)]
        paths = [blob.path for blob in blobs]
        with ExitStack() as stack:
            servings = [stack.enter_context(serve()) for serve in (stage.empty_proxy, stage.caching_nginx)]
            found: dict[str, float] = {}
            for serving in turned(round_, [*servings, stage.registry]):
                tell("first", case, serving.name)
                done = stage.generator.ask(serving, paths, count=len(paths))
                found[serving.name] = done.first * _MS
                table.add("first", case, serving.name, "first byte", "ms", found[serving.name])
        for name in (PROXY, NGINX):
            table.add("first", case, name, "over direct", "ms", found[name] - found[DIRECT])


def joined(stage: Stage, table: Table) -> None:
    """Many clients that ask at once for a blob that the registry sends slowly, beside one client alone."""
    case, blob = f"{JOINING} clients", make_blob(stage.root, stage.scale.joined)
    for round_ in range(stage.scale.rounds):
        with stage.empty_proxy() as serving:
            tell("joined", "1 client", serving.name)
            alone = _slowly(stage, table, "1 client", serving, blob, 1)
        for serve in turned(round_, [stage.empty_proxy, stage.caching_nginx]):
            with serve() as serving:
                tell("joined", case, serving.name)
                took = _slowly(stage, table, case, serving, blob, JOINING)
                if serving.name == PROXY:
                    table.add("joined", case, PROXY, "over alone", "×", took / alone)
    stage.remove(blob)


def crowd(stage: Stage, table: Table) -> None:
    """A layer that a whole fleet asks for at the same moment."""
    count = stage.scale.crowd
    case = f"{count:,} clients"
    for round_ in range(stage.scale.rounds):
        blob = make_blob(stage.root, stage.scale.crowd_blob)
        for serve in turned(round_, [stage.empty_proxy, stage.caching_nginx]):
            with serve() as serving:
                tell("crowd", case, serving.name)
                mark = stage.origin_mark()
                done = stage.generator.ask(serving, [blob.path], connections=count, count=1)
                note_bytes(table, "crowd", case, serving, done, done.bytes)
                table.add("crowd", case, serving.name, "last first byte", "ms", max(done.firsts) * _MS)
                table.add("crowd", case, serving.name, "from upstream", "blobs", _copies(stage, mark, blob))
        stage.remove(blob)


def _slowly(stage: Stage, table: Table, case: str, serving: Serving, blob: Resource, count: int) -> float:
    """Return the seconds until the last client has the blob."""
    mark = stage.origin_mark()
    done = stage.generator.ask(serving, [blob.slow], connections=count, count=1)
    if count > 1:
        after = (max(done.firsts) - min(done.firsts)) * _MS
        table.add("joined", case, serving.name, "first byte", "ms", after)
        table.add("joined", case, serving.name, "from upstream", "blobs", _copies(stage, mark, blob))
    table.add("joined", case, serving.name, "last end", "s", done.wall)
    return done.wall


def _copies(stage: Stage, mark: int, blob: Resource) -> float:
    return stage.origin_sent(mark) / blob.size

"""`python -m bench`: the options, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import goals
from bench.clients import Clients
from bench.document import OUTPUT
from bench.footprint import memory, start
from bench.hits import MANY, hit, plain, second
from bench.image import image
from bench.machine import load_average, machine
from bench.misses import JOINING, crowd, first, joined, miss
from bench.push import PUSH_MEASURES
from bench.requests import connect, small
from bench.scale import FULL, QUICK, Scale
from bench.servers import BenchError
from bench.stage import Stage
from bench.startup import prepare
from bench.table import Table

MEASURES: dict[str, Callable[[Stage, Table], None]] = {
    "hit": hit,
    "plain": plain,
    "miss": miss,
    "first": first,
    "joined": joined,
    "crowd": crowd,
    "small": small,
    "connect": connect,
    "second": second,
    "memory": memory,
    "start": start,
    "image": image,
    **PUSH_MEASURES,
}


def main() -> None:
    """Measure what the command line asks for, print it, and write it to a file."""
    options = _options()
    scale = QUICK if options.quick else FULL
    prepare()
    table, began, failures = Table(), time.monotonic(), []
    try:
        about = machine()
        with Clients(MANY) as clients, Stage.open(scale, clients) as stage:
            for name in options.only:
                try:
                    MEASURES[name](stage, table)
                except BenchError as error:  # the others may take half an hour, and can be had all the same
                    failures.append(f"{name}: {error}")
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    about["load average at the end"] = load_average()
    about["rounds"] = f"{scale.rounds}, of which the medians are shown; {(time.monotonic() - began) / 60:.0f} minutes"
    verdicts = list(goals.verdicts(table))
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    text = table.text(_titles(scale))
    print(f"\n{goals.text(verdicts)}\n\nAll figures; a ratio is the proxy's over the other's.\n{text}")
    data = {
        "machine": about,
        "targets": [verdict.data() for verdict in verdicts],
        "rows": table.data(),
        "text": text,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(data, indent=1) + "\n")
    if failures:
        sys.exit("\n".join(f"bench: {failure}" for failure in failures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description="Measure the proxy beside nginx and docker-registry.")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works, and no more")
    parser.add_argument("--only", type=_names, default=list(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument(
        "--json", type=Path, default=OUTPUT, metavar="FILE", help="where all figures of all rounds go (%(default)s)"
    )
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(MEASURES)}")
    return names


def _titles(scale: Scale) -> dict[str, str]:
    size = _size(scale.blob)
    return {
        "hit": f"hit: a blob of {size} that is cached (nginx: a file)",
        "plain": "plain: the same in plain HTTP, from the hosted registry and as a mirror (nginx: sendfile)",
        "miss": f"miss: a blob of {size} that is fetched (nginx: proxy_cache, proxy_cache_lock)",
        "first": "first: small blobs that are fetched, one after the other on one connection (nginx: proxy_cache)",
        "joined": f"joined: a blob of {_size(scale.joined)} that comes at {scale.slow_rate / 1e6:.0f} MB/s, to "
        f"{JOINING} clients at once (nginx: proxy_cache)",
        "crowd": f"crowd: a blob of {_size(scale.crowd_blob)} that nobody has, to {scale.crowd:,} clients at once "
        "(nginx: proxy_cache)",
        "small": "small: what is cached, on connections that stay open; per core (nginx: a file)",
        "connect": "connect: a cached blob of 1.5 KiB, each on a new connection; per core (nginx: no CONNECT)",
        "second": "second: two workers and their clients on two cores, over one worker and the same clients on one",
        "memory": f"memory: the resident set, and its growth for each of {scale.memory_connections} connections",
        "start": "start: from the start to listening; connecting to a host that is new",
        "image": f"image: skopeo copy of {scale.layers} layers of 100 kB (direct: docker-registry; nginx: files)",
        "push": f"push: a layer of {size}, in chunks, by 1 client; layers of 10 kB by 5 clients (TLS)",
        "gc": "gc: garbage collection, half of the blobs being garbage, and requests beside it",
    }


def _size(size: int) -> str:
    return "1 GiB" if size == 1 << 30 else f"{size >> 20} MiB"


if __name__ == "__main__":
    main()

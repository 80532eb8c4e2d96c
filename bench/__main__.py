"""`python -m bench`: the options, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import performance_targets
from bench.clients import ClientPool
from bench.document import RUN_FILE
from bench.footprint import memory, startup
from bench.hits import MANY_CLIENTS, core_scaling, hit, plain_http
from bench.image import image_copy
from bench.machine import describe_machine, load_average
from bench.misses import JOINING_CLIENTS, joined_download, miss, thundering_herd, time_to_first_byte
from bench.process_setup import configure_process
from bench.push import PUSH_MEASURES
from bench.requests import new_connections, small_requests
from bench.scale import FULL, QUICK, Scale
from bench.servers import BenchError
from bench.table import ResultTable
from bench.testbed import Testbed

BENCHMARKS: dict[str, Callable[[Testbed, ResultTable], None]] = {
    "hit": hit,
    "plain": plain_http,
    "miss": miss,
    "first": time_to_first_byte,
    "joined": joined_download,
    "crowd": thundering_herd,
    "small": small_requests,
    "connect": new_connections,
    "second": core_scaling,
    "memory": memory,
    "start": startup,
    "image": image_copy,
    **PUSH_MEASURES,
}


def main() -> None:
    """Measure what the command line asks for, print it, and write it to a file."""
    options = parse_options()
    scale = QUICK if options.quick else FULL
    configure_process()
    table, started, failures = ResultTable(), time.monotonic(), []
    try:
        description = describe_machine()
        with ClientPool(MANY_CLIENTS) as clients, Testbed.open(scale, clients) as testbed:
            for name in options.only:
                try:
                    BENCHMARKS[name](testbed, table)
                except BenchError as error:  # the others may take half an hour, and can be had all the same
                    failures.append(f"{name}: {error}")
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    description["load average at the end"] = load_average()
    description["rounds"] = (
        f"{scale.rounds}, of which the medians are shown; {(time.monotonic() - started) / 60:.0f} minutes"
    )
    target_results = list(performance_targets.evaluate(table))
    print("\n".join(f"{name}: {value}" for name, value in description.items()))
    figures_text = table.render(_titles(scale))
    print(
        f"\n{performance_targets.render_results(target_results)}\n\nAll figures; a ratio is the proxy's over the other's.\n{figures_text}"
    )
    data = {
        "machine": description,
        "targets": [verdict.as_dict() for verdict in target_results],
        "rows": table.as_dicts(),
        "text": figures_text,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(data, indent=1) + "\n")
    if failures:
        sys.exit("\n".join(f"bench: {failure}" for failure in failures))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description="Measure the proxy beside nginx and docker-registry.")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works, and no more")
    parser.add_argument("--only", type=parse_names, default=list(BENCHMARKS), help=f"some of {','.join(BENCHMARKS)}")
    parser.add_argument(
        "--json", type=Path, default=RUN_FILE, metavar="FILE", help="where all figures of all rounds go (%(default)s)"
    )
    return parser.parse_args()


def parse_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BENCHMARKS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(BENCHMARKS)}")
    return names


def _titles(scale: Scale) -> dict[str, str]:
    size = _size(scale.large_blob)
    return {
        "hit": f"hit: a blob of {size} that is cached (nginx: a file)",
        "plain": "plain: the same in plain HTTP, from the hosted registry and as a mirror (nginx: sendfile)",
        "miss": f"miss: a blob of {size} that is fetched (nginx: proxy_cache, proxy_cache_lock)",
        "first": "first: small blobs that are fetched, one after the other on one connection (nginx: proxy_cache)",
        "joined": f"joined: a blob of {_size(scale.joined_blob)} that comes at {scale.slow_rate / 1e6:.0f} MB/s, to "
        f"{JOINING_CLIENTS} clients at once (nginx: proxy_cache)",
        "crowd": f"crowd: a blob of {_size(scale.herd_blob)} that nobody has, to {scale.herd_clients:,} clients at once "
        "(nginx: proxy_cache)",
        "small": "small: what is cached, on connections that stay open; per core (nginx: a file)",
        "connect": "connect: a cached blob of 1.5 KiB, each on a new connection; per core (nginx: no CONNECT)",
        "second": "second: two workers and their clients on two cores, over one worker and the same clients on one",
        "memory": f"memory: the resident set, and its growth for each of {scale.memory_connections} connections",
        "start": "start: from the start to listening; connecting to a host that is new",
        "image": f"image: skopeo copy of {scale.image_layers} layers of 100 kB (direct: docker-registry; nginx: files)",
        "push": f"push: a layer of {size}, in chunks, by 1 client; layers of 10 kB by 5 clients (TLS)",
        "gc": "gc: garbage collection, half of the blobs being garbage, and requests beside it",
    }


def _size(size: int) -> str:
    return "1 GiB" if size == 1 << 30 else f"{size >> 20} MiB"


if __name__ == "__main__":
    main()

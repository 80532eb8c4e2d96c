"""`python -m bench`: parses the options, runs the benchmarks, and prints and saves the results."""

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
from bench.fleet import fleet
from bench.footprint import memory, startup
from bench.hits import MANY_CLIENTS, core_scaling, hit, plain_http
from bench.image import image_copy
from bench.machine import describe_machine, load_average
from bench.misses import JOINING_CLIENTS, joined_download, miss, thundering_herd, time_to_first_byte
from bench.process_setup import configure_process
from bench.push import PUSH_BENCHMARKS
from bench.requests import new_connections, small_requests
from bench.scale import FULL, QUICK, Scale
from bench.servers import BenchError
from bench.table import ResultTable
from bench.testbed import Testbed

BENCHMARKS: dict[str, Callable[[Testbed, ResultTable], None]] = {
    "hit": hit,
    "http": plain_http,
    "miss": miss,
    "ttfb": time_to_first_byte,
    "joined": joined_download,
    "herd": thundering_herd,
    "small": small_requests,
    "connect": new_connections,
    "scaling": core_scaling,
    "memory": memory,
    "startup": startup,
    "image": image_copy,
    **PUSH_BENCHMARKS,
    "fleet": fleet,
}


def main() -> None:
    """Run the benchmarks that the command line names, print the results, and write them to a file."""
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
                except BenchError as error:  # run the others anyway, because a whole run takes half an hour
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
    print(f"\n{performance_targets.render_results(target_results)}")
    print(f"\nAll figures; a ratio is the proxy's value over the peer's.\n{figures_text}")
    data = {
        "machine": description,
        "targets": [result.as_dict() for result in target_results],
        "rows": table.as_dicts(),
        "text": figures_text,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(data, indent=1) + "\n")
    if failures:
        sys.exit("\n".join(f"bench: {failure}" for failure in failures))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description="Measure the proxy beside nginx and docker-registry.")
    parser.add_argument("--quick", action="store_true", help="run one short round, to check that everything works")
    parser.add_argument(
        "--only", type=parse_names, default=list(BENCHMARKS), help=f"a comma-separated part of {','.join(BENCHMARKS)}"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RUN_FILE,
        metavar="FILE",
        help="write the figures of every round to FILE (%(default)s)",
    )
    return parser.parse_args()


def parse_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BENCHMARKS:
            raise argparse.ArgumentTypeError(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    return names


def _titles(scale: Scale) -> dict[str, str]:
    size = _size(scale.large_blob)
    return {
        "hit": f"hit: a cached blob of {size} (nginx: a file)",
        "http": "http: the same over plain HTTP, from the hosted registry and as a mirror (nginx: sendfile)",
        "miss": f"miss: an uncached blob of {size} (nginx: proxy_cache, proxy_cache_lock)",
        "ttfb": "ttfb: small uncached blobs, one after the other on one connection (nginx: proxy_cache)",
        "joined": f"joined: a blob of {_size(scale.joined_blob)} that upstream sends at {scale.slow_rate / 1e6:.0f} "
        f"MB/s, to {JOINING_CLIENTS} clients at once (nginx: proxy_cache)",
        "herd": f"herd: an uncached blob of {_size(scale.herd_blob)}, to {scale.herd_clients:,} clients at once "
        "(nginx: proxy_cache)",
        "small": "small: cached content, on connections that stay open; per core (nginx: a file)",
        "connect": "connect: a cached blob of 1.5 KiB, each on a new connection; per core (nginx: no CONNECT)",
        "scaling": "scaling: two workers and their clients on two cores, over one worker and the same clients on one",
        "memory": f"memory: the resident set, and its growth for each of {scale.memory_connections} connections",
        "startup": "startup: from the start to listening; the first connection to a new host",
        "image": f"image: skopeo copy of {scale.image_layers} layers of 100 kB (direct: docker-registry; nginx: files)",
        "push": f"push: a layer of {size}, in chunks, by 1 client; layers of 10 kB by 5 clients (TLS)",
        "fleet": f"fleet: three members and a bucket, a layer of {size} (registry:2: its s3 driver on the same store); "
        "a cached blob of the same size",
        "gc": "gc: garbage collection with half of the blobs unreferenced, and requests during it",
    }


def _size(size: int) -> str:
    return "1 GiB" if size == 1 << 30 else f"{size >> 20} MiB"


if __name__ == "__main__":
    main()

"""Run the fuzzers: python -m tests.fuzz [--minutes N] [NAME...]

Each harness gets the same part of the time, in a process of its own, with atheris (libFuzzer). Inputs that reach new
code are kept in .cache/fuzz, so that the next run continues. An input that fails is printed and kept there as well;
save it in the corpus, as a test.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.corpus import FOLDER
from tests.fuzz.harnesses import HARNESSES

_ROOT = Path(__file__).parents[2]
_CACHE = _ROOT / ".cache/fuzz"
_INPUT_TIMEOUT = 20  # seconds for one input
_MAX_LENGTH = 8192
_MEMORY = 1024  # MiB


def main() -> int:
    """Run the harnesses that the command line names, and return the exit status."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Run the fuzzers.")
    parser.add_argument("--minutes", type=float, default=10, help="minutes for all of them together")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*HARNESSES, "live"]))
    options = parser.parse_args()
    names = options.names or [*HARNESSES, "live"]
    unknown = sorted({*names} - {*HARNESSES, "live"})
    if unknown:
        parser.error(f"there is no fuzzer {unknown[0]}")
    seconds = max(1, int(60 * options.minutes / len(names)))
    failed = [name for name in names if not _run(name, seconds)]
    print(f"{len(names) - len(failed)} of {len(names)} fuzzers found nothing")
    for name in failed:
        print(f"failed: {name}; the inputs are in {_CACHE}")
    return 1 if failed else 0


def _run(name: str, seconds: int) -> bool:
    print(f"== {name}, {seconds} s", flush=True)
    if name == "live":
        command = ["tests.fuzz.live", "--seconds", str(seconds)]
    else:
        work = _CACHE / name
        work.mkdir(parents=True, exist_ok=True)
        command = [
            *("tests.fuzz.atheris_run", name, f"-max_total_time={seconds}", f"-timeout={_INPUT_TIMEOUT}"),
            *(f"-max_len={_MAX_LENGTH}", f"-rss_limit_mb={_MEMORY}", "-print_final_stats=1", "-verbosity=0"),
            *(f"-artifact_prefix={_CACHE}/{name}-", str(work), str(FOLDER / name)),
        ]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    return subprocess.run([sys.executable, "-m", *command], cwd=_ROOT, env=environment).returncode == 0


if __name__ == "__main__":
    sys.exit(main())

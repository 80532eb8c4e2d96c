"""`make test-clients`: runs every client of the matrix, and puts the table into docs/clients.md.

The exit status is 1 if a client fails through the proxy with something that it can do directly.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.document import replace_section
from tests.clients.matrix import ClientMatrix, MatrixRow
from tests.clients.matrix_clients import CLIENTS
from tests.clients.table import describe, render
from tests.clients.upstream_set import UpstreamSet
from tests.e2e.harness.clients import Machine
from tests.e2e.harness.registry_daemon import RegistryDaemon, write_htpasswd

PROJECT = Path(__file__).resolve().parents[2]
DOCUMENT = PROJECT / "docs/clients.md"
SECTION = "last run"
RELEASES = {"trixie": "Debian 13", "sid": "Debian sid"}
_BASE_PACKAGES = ("ca-certificates", "runc", "crun", "python3-grpcio", "docker-cli")


def main() -> int:
    """Create the trees, run the matrix in them, and write the document."""
    parser = argparse.ArgumentParser("clients", description=__doc__)
    parser.add_argument(
        "--only", default="", help="run the clients that have these letters in their names; write nothing"
    )
    options = parser.parse_args()
    if os.geteuid() != 0:
        print(
            "Run this as root, which is needed to create Debian trees, and to start dockerd in them.", file=sys.stderr
        )
        return 1
    started = time.monotonic()

    def report(text: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s  {text}", flush=True)

    notes: list[str] = []
    trees: dict[str, Path] = {}
    for release, title in RELEASES.items():
        report(f"the tree of {title}")
        try:
            trees[release] = make_tree(release)
        except subprocess.CalledProcessError:
            if release == "trixie":
                raise
            notes.append(f"The clients of {title} were not run, because its packages could not be installed.")
    with tempfile.TemporaryDirectory(prefix="drp-", dir="/var/tmp") as name:
        rows = make_rows(trees, Path(name), options.only)
        run_matrix(Path(name), rows, report)
    red_steps = sum(len(row.red_steps) for row in rows)
    print(*describe(rows), sep="\n")
    if not options.only:
        minutes = (time.monotonic() - started) / 60
        notes.append(
            f"{time.strftime('%Y-%m-%d', time.gmtime())}, {os.cpu_count()} cores, Linux {platform.release()}, "
        )
        notes[-1] += f"{len(rows)} clients in {minutes:.0f} minutes; {red_steps} steps failed through the proxy only."
        DOCUMENT.write_text(replace_section(DOCUMENT.read_text(), SECTION, render(rows, notes)))
    report(f"{len(rows)} clients; {red_steps} steps failed through the proxy only")
    return 1 if red_steps else 0


def make_tree(release: str) -> Path:
    """Create the tree of `release` with all clients, unless it is in the cache, and return its root directory."""
    folder = PROJECT / ".cache/debian" / f"clients-{release}"
    packages = dict.fromkeys((*_BASE_PACKAGES, *(c.PACKAGE for c in CLIENTS if release not in c.MISSING_IN)))
    command = [str(PROJECT / "tools/debian-root"), str(folder), ",".join(packages)]
    subprocess.run(command, env={**os.environ, "SUITE": release}, stdin=subprocess.DEVNULL, check=True)
    return folder / "root"


def make_rows(trees: dict[str, Path], folder: Path, only: str) -> Sequence[MatrixRow]:
    """Return a row for each client of each release. Those of one client are together."""
    return [
        MatrixRow(
            number, client, Machine(trees[release], folder), release, package_version(trees[release], client.PACKAGE)
        )
        for number, (client, release) in enumerate(itertools.product(CLIENTS, trees))
        if release not in client.MISSING_IN and only.lower() in client.__name__.lower()
    ]


def package_version(tree: Path, package: str) -> str:
    """Return the upstream version of the program in an installed package."""
    command = ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "--show", "--showformat=${Version}", package]
    version = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.sub(r"^\d+:|[-+~][^-]*(-.*)?$", "", version)


def run_matrix(folder: Path, rows: Sequence[MatrixRow], report: Callable[[str], None]) -> None:
    """Start the registries and the daemon, and fill in the outcomes of `rows`."""
    upstreams = UpstreamSet(folder / "upstreams")
    upstreams.start()
    settings = {"HTPASSWD_FILE": str(write_htpasswd(folder)), "ANONYMOUS_PULL": "true"}
    daemon = RegistryDaemon(folder / "daemon", {**upstreams.settings, **settings})
    upstreams.open_internet({"docker-registry.local:443": daemon.registry_port})
    try:
        with daemon.run_and_check_log(lambda: [upstreams.password]):
            ClientMatrix(folder, upstreams, daemon, report).run(rows)
    finally:
        upstreams.stop()


if __name__ == "__main__":
    sys.exit(main())

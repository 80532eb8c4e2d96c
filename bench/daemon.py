"""Start-up of the daemon under test, from this tree, and its command line tool."""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from attrs import field, frozen

from bench.servers import BenchServer, CoreAssignment, free_port

_PROJECT = Path(__file__).resolve().parents[1]
_TWISTD_SOURCE = "from twisted.scripts.twistd import run; run()"
_CLI_SOURCE = "import sys; sys.path.insert(0, sys.argv.pop(1)); from dockerproxy.cli import main; sys.exit(main())"
_INHERITED_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR")


@frozen
class DaemonPorts:
    """The ports of the daemon: the proxy's, and the hosted registry's with TLS and without."""

    proxy: int = field(factory=free_port)
    registry_tls: int = field(factory=free_port)
    registry_http: int = field(factory=free_port)


def make_daemon(
    folder: Path,
    state: Path,
    ports: DaemonPorts,
    settings: Mapping[str, str],
    *,
    workers: int | None = None,
    cores: CoreAssignment | None = None,
) -> BenchServer:
    """Return a daemon that is not started yet, with its state below `state`.

    Without `workers` it uses its default, one worker for each core.
    """
    environment = {name: value for name, value in os.environ.items() if name in _INHERITED_VARIABLES}
    environment |= {
        "PYTHONPATH": str(_PROJECT),
        "STATE_DIR": str(state),
        "PROXY_LISTEN": f"tcp:{ports.proxy}:interface=127.0.0.1",
        "REGISTRY_LISTEN": f"tcp:{ports.registry_tls}:interface=127.0.0.1",
        "REGISTRY_HTTP_LISTEN": f"tcp:{ports.registry_http}:interface=127.0.0.1",
        **({} if workers is None else {"WORKERS": str(workers)}),
        **settings,
    }
    argv = [sys.executable, "-c", _TWISTD_SOURCE, "--nodaemon", "--pidfile=", "dockerproxy"]
    listening_ports = [ports.proxy, ports.registry_tls, ports.registry_http]
    return BenchServer(argv, folder, environment, listening_ports, workers=workers or default_workers(), cores=cores)


def default_workers() -> int:
    """Return the number of workers that the daemon starts by default."""
    return min(max(len(os.sched_getaffinity(0)), 1), 8)


def fetch_ca(folder: Path, port: int) -> Path:
    """Download the CA of the daemon with the proxy port `port` into `folder`, and return the file."""
    file = folder / "ca.crt"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/ca.crt", timeout=10) as response:
        file.write_bytes(response.read())
    return file


def cli_command(state: Path, *arguments: str) -> list[str]:
    """Return the command line of `dockerproxy` with `arguments`, for the daemon with its state in `state`."""
    return [sys.executable, "-c", _CLI_SOURCE, str(_PROJECT), *arguments, "--socket", f"{state}/run/control.sock"]

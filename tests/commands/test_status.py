"""The output of `status`, and its exit status, which says whether something is bad."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import NOW, ControlSocketStub, Run

ROOT = Path(__file__).parents[2]
DAY = 86400


def registry(name: str, **fields: Any) -> dict[str, Any]:
    row = {
        "kind": "cached", "up": True, "requests": 1200, "served": 5_000_000_000, "ratio": 0.934, "p95": 0.0123,
        "budget": None, "problem": "",
    }  # fmt: skip
    return {"name": name, **row, **fields}


def limit(**fields: Any) -> dict[str, Any]:
    return {"remaining": 34, "limit": 100, "refused_until": 0.0, **fields}


@pytest.fixture
def facts(daemon: ControlSocketStub) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "version": "1.2.3",
        "started": NOW - 3 * DAY,
        "processes": [{"number": 0, "state": "serving", "pid": 1}, {"number": 1, "state": "serving", "pid": 2}],
        "ports": [
            {"setting": "PROXY_LISTEN", "address": "[::]:3128"},
            {"setting": "REGISTRY_LISTEN", "address": "0.0.0.0:443"},
        ],
        "ca": {"sha256": "AB:CD", "expires": NOW + 3000 * DAY},
        "operation": None,
        "refused_logins": [],
        "fleet": {},
        "cache": {"bytes": 20 << 30, "limit": 32 << 30},
        "shelves": {
            "hosted": {"directory": "/srv/registry", "file_system": "nfs4", "free": 10**12},
            "cached": {"directory": "/srv/cache", "file_system": None, "free": 5 * 10**11},
        },
    }
    daemon.answers["GET /v1/status"] = answer
    return answer


@pytest.fixture
def doctor(daemon: ControlSocketStub) -> dict[str, Any]:
    answer: dict[str, Any] = {"level": "ok", "findings": [finding("ok", "all ports are open")]}
    daemon.answers["GET /v1/doctor"] = answer
    return answer


def finding(level: str, sentence: str) -> dict[str, Any]:
    return {"check": "x", "subject": "", "level": level, "sentence": sentence, "advice": "", "public": False}


@pytest.fixture
def overview(daemon: ControlSocketStub, doctor: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "day": {"requests": 12345, "served": 6 * 10**12, "saved": 5 * 10**12, "ratio": 0.83, "errors": 1},
        "registries": [
            registry("docker.io", budget=limit()),
            registry("quay.io", up=False, problem="does not answer: connection timed out", p95=1.26),
            registry("ghcr.io", budget=limit(refused_until=NOW + 600)),
            registry("gcr.io", up=None, ratio=None, p95=None, requests=0, served=0, budget=limit(remaining=None)),
            registry("hosted", kind="hosted", p95=12.5),
        ],
    }
    daemon.answers["GET /v1/overview"] = answer
    return answer


STATUS = """\
docker-registry-proxy 1.2.3, running for 3 days (since 2027-01-12 08:00:00), 2 processes
listening on [::]:3128 (PROXY_LISTEN), 0.0.0.0:443 (REGISTRY_LISTEN)
in 24 h: 12345 requests, 6 TB served, 5 TB of it from the cache (83 %), 1 error
REGISTRY   STATE                                  REQUESTS  SERVED  FROM CACHE  P95    BUDGET
docker.io  ok                                     1200      5 GB    93 %        12 ms  34 of 100
quay.io    does not answer: connection timed out  1200      5 GB    93 %        1.3 s  -
ghcr.io    ok                                     1200      5 GB    93 %        12 ms  none until 08:10:00
gcr.io     -                                      0         0 B     -           -      -
hosted     ok                                     1200      5 GB    93 %        12 s   -
hosted in /srv/registry on nfs4, 1 TB free
cached in /srv/cache, 21.5 GB of 34.4 GB used, 500 GB free
the CA certificate ends 2035-04-03 (in 3000 days)
SHA-256 of the CA certificate: AB:CD
idle
"""


def test_status(facts: dict[str, Any], overview: dict[str, Any], run: Run) -> None:
    assert run("status") == (0, STATUS, "")


def test_something_is_bad(
    facts: dict[str, Any], overview: dict[str, Any], doctor: dict[str, Any], run: Run, daemon: ControlSocketStub
) -> None:
    doctor |= {"level": "warn", "findings": [finding("warn", "the CA ends soon")]}
    assert run("status")[0] == 0
    assert daemon.requests[-1] == ("GET /v1/doctor?quick=1", None), "a full run asks registries, which takes seconds"
    doctor["level"] = "bad"
    doctor["findings"].insert(0, finding("bad", "quay.io does not answer\x1b[2J"))
    status, output, _ = run("status")
    assert status == 1
    assert output.endswith(
        "idle\nbad: quay.io does not answer\\x1b[2J\nwarn: the CA ends soon\n"
        "`dockerproxy doctor` looks closer, and says what to do\n"
    )
    status, output, _ = run("--json", "status")
    assert (status, json.loads(output)["doctor"]) == (1, doctor)


def test_a_disk_that_fails_is_bad(facts: dict[str, Any], overview: dict[str, Any], run: Run) -> None:
    facts["shelves"]["hosted"] |= {"free": None, "error": "REGISTRY_DIR has not answered within 2 s"}
    status, output, _ = run("status")
    assert status == 1
    assert "hosted in /srv/registry on nfs4: REGISTRY_DIR has not answered within 2 s\n" in output


def test_the_operation_and_refused_logins(facts: dict[str, Any], overview: dict[str, Any], run: Run) -> None:
    facts["operation"] = {"name": "gc", "user": "alice", "since": NOW - 180}
    facts["refused_logins"] = [
        {"registry": "quay.io", "setting": "AUTH_REGISTRIES", "since": NOW - 60, "reason": "wrong password"}
    ]
    output = run("status")[1]
    assert output.endswith(
        "gc of alice running for 3 minutes\n"
        "login for quay.io (AUTH_REGISTRIES) refused since 1 minute ago: wrong password\n"
    )


def test_an_ended_ca_and_a_missing_worker(facts: dict[str, Any], overview: dict[str, Any], run: Run) -> None:
    facts["ca"]["expires"] = NOW - 1
    facts["processes"][1]["state"] = "starting"
    output = run("status")[1]
    assert "the CA certificate ended 2027-01-15\n" in output
    assert output.splitlines()[0].endswith("2 processes, 1 of them serving")


def test_status_loads_little() -> None:
    """A script may ask each second, so what it does not need is not loaded."""
    program = "import sys, dockerproxy.cli, dockerproxy.commands.status; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert not packages & {"rich", "argcomplete", "twisted", "attr", "attrs", "jinja2", "cryptography", "asyncio"}


def test_the_members_of_a_fleet(facts: dict[str, Any], overview: dict[str, Any], run: Run) -> None:
    facts["fleet"] = {"10.0.0.1:3128": "me", "10.0.0.2:3128": "up", "10.0.0.3:3128": "connection refused"}
    output = run("status")[1]
    assert "fleet: 3 members, 1 of them down; this daemon is 10.0.0.1:3128" in output
    assert "member 10.0.0.3:3128 is down: connection refused" in output
    facts["fleet"] = {"10.0.0.2:3128": "up"}
    assert "fleet: 1 member, 0 of them down; this daemon is not among them" in run("status")[1]

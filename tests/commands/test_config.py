"""The output of `config` and `reload`, and their exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import ControlSocketStub, Run

PATH = "/etc/docker-registry-proxy/environment"


def setting(name: str, value: str, source: str = "default", place: str = "", **fields: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "source": source, "place": place, "reload": False, "pending": None, **fields}


SETTINGS = [
    setting("REGISTRIES", "quay.io ghcr.io", "file", f"{PATH}, line 12", reload=True),
    setting("AUTH_REGISTRIES", "quay.io:***", "credential", "docker-registry-proxy.auth_registries", reload=True),
    setting("CACHE_MAX_SIZE", "32g", pending="64g"),
    setting("HTPASSWD_FILE", ""),
    setting("AUTH_REGISTRIES_DELIMITER", " "),
    setting("UPSTREAM_PROXY", "http://***@proxy:3128", "environment", "HTTPS_PROXY"),
    setting("WORKERS", "4", "environment", "WORKERS"),
]
CONFIG = """\
SETTING                    VALUE                  FROM
REGISTRIES                 quay.io ghcr.io        /etc/docker-registry-proxy/environment, line 12
AUTH_REGISTRIES            quay.io:***            credential (docker-registry-proxy.auth_registries)
CACHE_MAX_SIZE             32g                    default
HTPASSWD_FILE              -                      default
AUTH_REGISTRIES_DELIMITER  ' '                    default
UPSTREAM_PROXY             http://***@proxy:3128  environment (HTTPS_PROXY)
WORKERS                    4                      environment
CACHE_MAX_SIZE is 64g now; restart the daemon to apply it
REGISTRIE is not a setting and has no effect.
"""


def test_config(daemon: ControlSocketStub, run: Run) -> None:
    answer = {"settings": SETTINGS, "warnings": ["REGISTRIE is not a setting and has no effect."]}
    daemon.answers["GET /v1/config"] = answer
    assert run("config") == (0, CONFIG, "")
    assert json.loads(run("config", "--json")[1]) == answer


def test_check_needs_no_daemon(daemon: ControlSocketStub, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.write_text("REGISTRIES=quay.io\n")
    assert run("config", "--check", str(path)) == (0, f"{path} can be used\n", "")
    path.write_text("WORKERS=many\n")
    status, output, _ = run("config", "--check", str(path))
    assert status == 1
    assert output == f"{path} cannot be used: WORKERS: 'many' is not a number from 1 to 64.\n"
    status, output, _ = run("config", "--check", str(path), "--json")
    assert (status, json.loads(output)["usable"]) == (1, False)
    assert "\x1b" not in run("config", "--check", str(tmp_path / "\x1b[2J"))[1]
    assert daemon.requests == []


def reload_result(**fields: Any) -> dict[str, Any]:
    empty = {"refused": None, "warnings": [], "needing_restart": [], "problems": []}
    return {"status": "serving docker.io, quay.io", **empty, **fields}


@pytest.mark.parametrize(
    ("result", "status", "output"),
    [
        (reload_result(), 0, "reloaded: serving docker.io, quay.io\n"),
        (
            reload_result(refused="WORKERS: 'many' is not a number from 1 to 64."),
            1,
            "not reloaded, the settings are unchanged: WORKERS: 'many' is not a number from 1 to 64.\n",
        ),
        (
            reload_result(needing_restart=["CACHE_MAX_SIZE", "WORKERS", "LOG_FORMAT"], warnings=["X has no effect."]),
            0,
            "X has no effect.\na restart is needed to apply CACHE_MAX_SIZE, WORKERS and LOG_FORMAT\n"
            "reloaded: serving docker.io, quay.io\n",
        ),
        (
            reload_result(problems=["worker 1 is restarted, because it could not reload: x"]),
            1,
            "worker 1 is restarted, because it could not reload: x\nreloaded: serving docker.io, quay.io\n",
        ),
    ],
    ids=["done", "refused", "restart", "worker"],
)
def test_reload(daemon: ControlSocketStub, run: Run, result: dict[str, Any], status: int, output: str) -> None:
    daemon.answers["POST /v1/reload"] = result
    assert run("reload") == (status, output, "")
    assert run("reload", "--json") == (status, f"{json.dumps(result)}\n", "")
    assert daemon.requests == [("POST /v1/reload", {})] * 2

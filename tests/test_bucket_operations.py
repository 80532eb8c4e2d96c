"""The process of an operation on a bucket, against a store that is not there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("botocore", reason="botocore is not installed (python3-botocore)")

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow  # each test starts a process with all of the daemon's code

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


def run(options: dict[str, Any], environment: dict[str, str]) -> list[dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, "-m", "dockerproxy.bucket_operations", "gc", json.dumps({"root": "s3://images", **options})],
        stdin=subprocess.PIPE, capture_output=True, cwd="/", timeout=60, check=True,
        env={"PYTHONPATH": str(ROOT), "AWS_EC2_METADATA_DISABLED": "true", **environment},
    )  # fmt: skip
    assert b"Traceback" not in ended.stderr, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize(
    ("options", "environment", "code", "words"),
    [
        ({}, {}, "FAILED", "REGISTRY_STORE: it is not set"),
        ({}, {"REGISTRY_STORE": "s3://A"}, "FAILED", "REGISTRY_STORE"),
        ({}, {"REGISTRY_STORE": "s3://images?endpoint=http://127.0.0.1:1"}, "FAILED", "there are no credentials"),
        ({"grace": 5}, {"REGISTRY_STORE": "s3://images", **KEYS}, "NOT_UNDERSTOOD", "at least 120"),
    ],
    ids=["not set", "invalid", "no key", "grace"],
)  # fmt: skip
def test_bad_settings_and_options(
    options: Any, environment: dict[str, str], code: str, words: str, tmp_path: Path
) -> None:
    files = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"), "AWS_CONFIG_FILE": str(tmp_path / "none")}
    (event,) = run(options, {**environment, **files})
    assert (event["event"], event["code"]) == ("error", code)
    assert words in event["message"]


def test_a_clock_that_is_set_back_stops_no_timer() -> None:
    """The reactor's clock is monotonic: gc waits for minutes, and renews its claim meanwhile."""
    program = """
import sys, time
from dockerproxy import bucket_operations

def check(reactor, settings):
    sys.exit(0 if reactor.seconds is time.monotonic else "another clock")

bucket_operations.open_settings_bucket = check
bucket_operations.run_on_bucket(None, {}, None)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(ROOT)}, cwd="/", timeout=60)


def test_a_store_that_does_not_answer() -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        store = f"s3://images?endpoint=http://127.0.0.1:{nobody_listens.getsockname()[1]}"
        (event,) = run({}, {"REGISTRY_STORE": store, **KEYS})
    assert (event["event"], event["code"]) == ("error", "STORE")
    assert "the bucket images" in event["message"] and "cannot be reached" in event["message"]

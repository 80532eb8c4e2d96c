"""The audit log has an entry for each change in each process, and a full disk stops no request."""

from __future__ import annotations

import getpass
import http.client
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import images
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.images import OCI_MANIFEST
from tests.e2e.harness.multi_process import MultiProcessDaemon, request_on
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import USERS, write_htpasswd

LOGIN = {"Authorization": basic_authorization("alice", USERS["alice"]), "User-Agent": "pusher/1"}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[MultiProcessDaemon]:
    daemon = MultiProcessDaemon(tmp_path / "daemon", {"HTPASSWD_FILE": str(write_htpasswd(tmp_path))})
    yield daemon
    daemon.stop()
    daemon.check_log(list(USERS.values()))


def push(connection: http.client.HTTPConnection, name: str, tag: str) -> str:
    """Push an image. Return its digest."""
    image = images.build_small_image(name)
    for blob in image.blobs:
        target = f"/v2/{name}/blobs/uploads/?digest={blob.digest}"
        assert request_on(connection, "POST", target, blob.data, LOGIN).status == 201
    headers = {**LOGIN, "Content-Type": OCI_MANIFEST}
    response = request_on(connection, "PUT", f"/v2/{name}/manifests/{tag}", image.manifest.data, headers)
    assert response.status == 201, response
    return image.manifest.digest


def test_changes_are_recorded(daemon: MultiProcessDaemon) -> None:
    daemon.start()
    wait_until(lambda: len(daemon.audit_entries()) == 1, "the new CA is recorded")
    assert (daemon.audit_entries()[0]["from"], daemon.audit_entries()[0]["action"]) == ("the daemon", "ca")
    with daemon.hosted_connection_to_each_process() as connections:
        for number, connection in enumerate(connections.values()):
            push(connection, f"audit/{number}", "v1")
        deletion = request_on(connection, "DELETE", "/v2/audit/0/manifests/v1", headers=LOGIN)
        assert deletion.status == 202
    assert daemon.run_cli("rm", "audit/1:v1").returncode == 0
    assert daemon.run_cli("gc", "--delete-untagged").returncode == 0
    os.kill(daemon.pid, signal.SIGHUP)
    wait_until(lambda: len(daemon.audit_entries()) == 8, "all changes are recorded")
    changes = daemon.audit_entries()[1:]
    entries = {(entry["user"], entry["action"], entry["target"].rpartition("/")[2]) for entry in changes}
    user = getpass.getuser()
    assert entries == {
        ("alice", "push", "0:v1"), ("alice", "push", "1:v1"), ("alice", "push", "2:v1"), ("alice", "delete", "0:v1"),
        (user, "remove", "1:v1 (hosted)"), (user, "gc", "registry"), (None, "reload", "the settings"),
    }  # fmt: skip
    pushes = daemon.audit_entries("push")
    assert {(entry["from"], entry["user_agent"], entry["result"]) for entry in pushes} == {
        ("127.0.0.1", "pusher/1", "done")
    }
    assert stat.S_IMODE((daemon.state_folder / "audit.jsonl").stat().st_mode) == 0o600


def test_an_audit_log_that_cannot_be_written_fails_no_request(daemon: MultiProcessDaemon) -> None:
    (daemon.state_folder / "audit.jsonl").mkdir(parents=True)
    daemon.start()
    with daemon.hosted_connection_to_each_process() as connections:
        for connection in connections.values():
            for number in range(3):
                push(connection, f"audit/unwritable-{number}", "v1")
    complaint = "audit.jsonl cannot be written, its entries are lost: Is a directory"
    wait_until(lambda: daemon.output_text.count(complaint) == len(daemon.serving_pids), "each process logs it once")

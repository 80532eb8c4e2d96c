"""Garbage collection in a bucket, by the command, on two daemons, with a collector that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.bucket import keys
from dockerproxy.bucket.gc_runs import RUNS, begun_key, run_prefix
from dockerproxy.oci.names import Digest
from tests.e2e.harness import images
from tests.e2e.harness.docker_registry import DockerRegistry
from tests.e2e.harness.multi_process import child_pids
from tests.e2e.harness.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore
from tests.e2e.harness.process import require_programs, wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.test_bucket import check_pull, command_line, get, push, run_command

pytestmark = pytest.mark.slow

SCALE = 0.05  # the shortest grace period is 6 s
GRACE = "6s"
BUCKET = "collected"
WASTE = 300


@pytest.fixture
def nodes(store: ObjectStore, tmp_path: Path) -> Iterator[list[RegistryDaemon]]:
    settings = store.settings(store.make_bucket(BUCKET))
    settings["REGISTRY_STORE"] += f"&gc_time_scale={SCALE}"
    nodes = [RegistryDaemon(tmp_path / name, settings) for name in ("first", "second")]
    with ExitStack() as stack:
        for node in nodes:
            stack.enter_context(node.run_and_check_log(lambda: [SECRET_KEY]))
        yield nodes


def collect(node: RegistryDaemon, *options: str) -> dict[str, Any]:
    ended = run_command(node, "gc", "--grace", GRACE, "--json", *options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def find_collector(node: RegistryDaemon) -> int | None:
    """Return the process that collects for `node`."""
    for pid in child_pids(node.pid):
        if b"dockerproxy.bucket_operations" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def test_a_collector_is_killed_and_the_next_one_ends_its_run(
    store: ObjectStore, nodes: list[RegistryDaemon], tmp_path: Path
) -> None:
    require_programs("docker-registry")
    first, second = nodes
    kept = push(first, "acme/app", "v1", images.build_small_image("kept"))
    untagged = push(first, "acme/app", "v2", images.build_small_image("untagged"))
    assert get(first, "acme/app/manifests/v2", "DELETE").status == 202
    for number in range(WASTE):
        content = b"waste %d" % number
        store.send(BUCKET, "PUT", keys.blob_key(Digest.of(content)), content)
        store.send(BUCKET, "PUT", keys.layer_key("acme/app", Digest.of(content)), str(Digest.of(content)).encode())
    blobs = WASTE + len(untagged.blobs) + 1
    wait_until(
        lambda: collect(first, "--dry-run", "--delete-untagged")["blobs"] == blobs, "all is older than the grace period"
    )
    assert not store.keys(BUCKET, RUNS), "a dry run leaves nothing"

    command = command_line(first, "gc", "--grace", GRACE, "--delete-untagged")
    with subprocess.Popen(command, env=first.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_until(lambda: len(store.keys(BUCKET, f"{run_prefix(1)}gone/")) > 20, "the run deletes", timeout=60)
        pid = find_collector(first)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        output = process.communicate(timeout=30)[0].decode()
    assert process.returncode != 0 and "killed by signal 9" in output
    assert not any(key.endswith(".end") for key in store.keys(BUCKET, RUNS))

    busy = run_command(second, "gc", "--grace", GRACE)
    assert busy.returncode != 0 and "gc of this bucket is run by" in busy.stdout + busy.stderr
    late = push(second, "acme/app", "v3", images.build_small_image("late"))
    store.send(BUCKET, "DELETE", begun_key(1))  # as if that run were long dead
    result = collect(second, "--delete-untagged")
    assert result["problems"] == [] and result["blobs"] > 0
    wait_until(lambda: collect(second, "--delete-untagged")["blobs"] == 0, "nothing is left to delete", timeout=60)
    data = [key for key in store.keys(BUCKET, keys.BLOBS) if key.endswith("/data")]
    needed = {str(blob.digest) for image in (kept, late) for blob in image.blobs} | {kept.digest, late.digest}
    assert {keys.blob_key(Digest.parse(str(digest))) for digest in needed} == set(data)
    for node in nodes:
        check_pull(node.http_port, "acme/app", "v1", kept)
        check_pull(node.http_port, "acme/app", "v3", late)
        assert get(node, f"acme/app/manifests/{untagged.digest}").status == 404
    wait_until(lambda: second.audit_entries("gc"), "gc is in the audit log")
    assert {entry["target"] for entry in second.audit_entries("gc")} == {f"s3://{BUCKET}"}

    s3 = {
        "accesskey": ACCESS_KEY, "secretkey": SECRET_KEY, "region": "us-east-1", "bucket": BUCKET,
        "regionendpoint": f"http://127.0.0.1:{store.port}", "secure": False, "v4auth": True,
    }  # fmt: skip
    other = DockerRegistry(tmp_path / "other", "127.0.0.1", storage={"s3": s3})
    try:
        other.start()
        check_pull(other.port, "acme/app", "v1", kept)
        check_pull(other.port, "acme/app", "v3", late)
    finally:
        other.stop()

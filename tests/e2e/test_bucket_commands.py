"""`ls`, `rm`, `check` and `import` on a bucket: the same as on a directory, from any node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dockerproxy.bucket import keys
from dockerproxy.oci.names import Digest
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.layout import Layout
from tests.e2e.harness import images
from tests.e2e.harness.object_store import SECRET_KEY, ObjectStore
from tests.e2e.harness.process import wait_until
from tests.e2e.harness.registry_daemon import RegistryDaemon
from tests.e2e.test_bucket import MIB, check_pull, get, push, run_command
from tests.store.support.images import BOTH, ONE, image, put_image

BUCKET = "commands"


@pytest.fixture(scope="module")
def nodes(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RegistryDaemon]]:
    """Return two nodes with a bucket, and a daemon with a directory."""
    folder = tmp_path_factory.mktemp("nodes")
    store.make_bucket(BUCKET)
    first, second = (RegistryDaemon(folder / name, store.settings(BUCKET)) for name in ("first", "second"))
    local = RegistryDaemon(folder / "local", {})
    with first.run_and_check_log(lambda: [SECRET_KEY]), second.run_and_check_log(lambda: [SECRET_KEY]):
        with local.run_and_check_log(list):
            yield [first, second, local]


def run_json(node: RegistryDaemon, *command: str, status: int = 0) -> Any:
    ended = run_command(node, *command, "--json")
    assert ended.returncode == status, ended.stdout + ended.stderr
    return json.loads(ended.stdout)


def without_times(document: Any) -> Any:
    match document:
        case dict():
            return {name: without_times(value) for name, value in document.items() if name != "last_used"}
        case list():
            return [without_times(value) for value in document]
    return document


def test_ls_and_rm_look_like_those_of_a_directory(nodes: list[RegistryDaemon]) -> None:
    first, second, local = nodes
    arm = images.build_small_image("arm")
    index = images.build_index({"amd64": images.build_small_image("amd"), "arm64": arm})
    for node in (first, local):
        push(node, "acme/app", "both", index)
        push(node, "acme/app", "arm", arm)
        push(node, "acme/other", "v1", arm)

    def check_same(*command: str, status: int = 0) -> str:
        shown = []
        for node in (second, local):
            ended = run_command(node, *command)
            assert ended.returncode == status, ended.stdout + ended.stderr
            shown.append(ended.stdout + ended.stderr)
        assert shown[0] == shown[1]
        return shown[0]

    for command in (["ls", "acme/*"], ["ls", "acme/app"], ["ls", "acme/app:both"]):
        assert without_times(run_json(second, *command)) == without_times(run_json(local, *command))
    for command in (["ls", "-q", "acme/*"], ["ls", "acme/app", "-q", "--sort", "size"], ["ls", "-q", "--limit", "1"]):
        check_same(*command)
    assert "linux/amd64, linux/arm64" in run_command(second, "ls", "acme/*").stdout
    check_same("ls", "acme/ap", status=4)
    for name in ("acme/app:both", f"acme/app@{arm.digest}", "acme/app:none", "acme/app"):
        check_same("why", name)
    assert arm.layers[0].digest[:15] in check_same("why", "acme/app:both")
    amd = index.children[0].digest
    assert "acme/app:both needs" in check_same("rm", f"acme/app@{amd}", status=7)
    check_same("rm", "--force", f"acme/app@{amd}")
    check_same("rm", "acme/app:arm", "acme/other")
    for node in nodes:
        assert get(node, f"acme/app/manifests/{amd}").status == 404
        assert get(node, "acme/app/tags/list").json["tags"] == ["both"]
        assert get(node, "_catalog").json["repositories"] == ["acme/app"]
    check_same("rm", "acme/app:none", status=4)
    check_same("rm", "acme/app")
    for node in (second, local):
        names = [f"acme/app@{amd}", "acme/app:arm", "acme/other", "acme/app"]
        wait_until(lambda: len(node.audit_entries("remove")) == len(names), "each removal is in the audit log")  # noqa: B023
        assert [entry["target"] for entry in node.audit_entries("remove")] == [f"{name} (hosted)" for name in names]


def test_check_finds_damage_and_a_push_mends_it(nodes: list[RegistryDaemon], store: ObjectStore) -> None:
    first, second, _ = nodes
    pushed = push(first, "acme/checked", "v1", images.build_small_image("checked"))
    result = run_json(second, "check")
    assert (result["findings"], result["damaged"]) == ([], 0)
    digest = Digest.parse(pushed.blobs[0].digest)
    store.send(BUCKET, "PUT", keys.blob_key(digest), b"damaged")
    ended = run_command(second, "check")
    assert ended.returncode == 1
    assert f"{digest} is damaged; moved to dockerproxy/damaged/ in the bucket {BUCKET}" in ended.stdout
    assert f"acme/checked: the manifest {pushed.digest} refers to {digest}, which is missing" in ended.stdout
    assert "1 blob moved to damaged/" in ended.stdout
    assert store.send(BUCKET, "GET", keys.damaged_key(digest)) == (200, b"damaged")
    push(first, "acme/checked", "v1", pushed)
    assert run_json(second, "check")["findings"] == []
    check_pull(second.http_port, "acme/checked", "v1", pushed)


def test_a_killed_import_is_repeated(nodes: list[RegistryDaemon], tmp_path: Path) -> None:
    first, second, _ = nodes
    tree = HostedTree.from_layout(Layout(tmp_path / "registry"))
    large = image(b"large", *(bytes([number]) * (20 * MIB) for number in range(3)))
    put_image(tree, "imported/app", BOTH, "v1")
    put_image(tree, "imported/app", large, "large")
    put_image(tree, "imported/two", ONE, "v1")
    command = [sys.executable, "-m", "dockerproxy.cli", "--socket", str(first.state_folder / "run/control.sock")]
    with subprocess.Popen([*command, "import", str(tree.layout.root)], env=first.environment) as importing:
        wait_until(lambda: import_processes(first), "the import runs")
        for process in import_processes(first):
            os.kill(process, signal.SIGKILL)
        assert importing.wait(60) != 0
    assert all(finding["kind"] != "damaged" for finding in run_json(second, "check")["findings"])
    result = run_json(second, "import", str(tree.layout.root))
    assert (result["findings"], result["repositories"]) == ([], 2)
    again = run_json(first, "import", str(tree.layout.root))
    assert (again["copied"], again["manifests"], again["tags"]) == (0, 0, 0)
    assert again["present"] == len(list(tree.blobs.walk()))
    assert run_json(first, "check")["findings"] == []
    for tag in ("v1", "large"):
        response = get(second, f"imported/app/manifests/{tag}", Accept="*/*")
        assert response.status == 200
    layer = get(second, f"imported/app/blobs/{Digest.of(bytes([2]) * (20 * MIB))}")
    assert layer.body == bytes([2]) * (20 * MIB)
    refused = run_command(first, "import", str(tmp_path))
    assert refused.returncode == 2 and "is not a registry's directory" in refused.stderr


def import_processes(daemon: RegistryDaemon) -> list[int]:
    """Return the processes of imports that are children of the daemon."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if (
                b"dockerproxy.bucket_operations" in command
                and str(daemon.state_folder).encode() in (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found

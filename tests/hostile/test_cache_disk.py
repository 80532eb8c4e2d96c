"""A small file system for the cache: it runs out of bytes and inodes, and clients do not notice.

The attacker is a hostile registry that has every tag of every repository, with a client that asks for them; or another
program that fills the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness.fake_registry import ResponseBehaviour
from tests.e2e.harness.http_server import HTTPExchange
from tests.e2e.harness.images import TypedContent, build_small_image, random_bytes
from tests.e2e.harness.process import mount_ext4, wait_until
from tests.hostile.conftest import EVIL, GOOD, HostileNetwork, StartRegistryDaemon

MIB = 1 << 20


@pytest.fixture
def few_inodes(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB with 1,000 inodes."""
    with mount_ext4(tmp_path / "inodes", "64M", 1000) as folder:
        yield folder / "cache"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    with mount_ext4(tmp_path / "disk", "64M", 20_000) as folder:
        yield folder / "cache"


def put(network: HostileNetwork, size: int, seed: str) -> str:
    """Put a blob into the honest registry, and return its URL."""
    return f"{GOOD}/v2/team/app/blobs/{network.good.put_blob('team/app', random_bytes(size, seed))}"


def answer_everything(manifest: TypedContent) -> ResponseBehaviour:
    """Have one manifest under every tag of every repository."""

    def respond(exchange: HTTPExchange, content: TypedContent | None) -> None:
        headers = {"Content-Type": manifest.media_type, "Docker-Content-Digest": manifest.digest}
        size = {"Content-Length": str(len(manifest.data))} if exchange.method == "HEAD" else {}
        exchange.respond(200, headers | size, manifest.data)

    return respond


def test_tags_and_repositories_without_number(
    few_inodes: Path, network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    daemon = start_daemon(CACHE_DIR=str(few_inodes))
    popular = put(network, MIB, "popular")
    assert daemon.client.get(popular).cache_status == "MISS"
    for method in ("GET", "HEAD"):
        network.evil.add_rule(method, "/manifests/", answer_everything(build_small_image("evil").manifest))

    def ask(repository: str, tag: str) -> None:
        response = daemon.client.get(f"{EVIL}/v2/{repository}/manifests/{tag}")
        assert response.status == 200, response

    number = 0
    while os.statvfs(few_inodes).f_favail:
        ask("x/y", f"tag-{number}")
        ask(f"x/repository-{number}", "latest")
        number += 1
    ask("x/one-more", "latest")
    assert daemon.client.get(popular).cache_status == "HIT"
    new = put(network, MIB, "new")
    for _ in range(2):
        assert daemon.client.get(new).body == random_bytes(MIB, "new")
    wait_until(lambda: os.statvfs(few_inodes).f_favail >= 40, "the janitor frees inodes")
    assert daemon.client.get(popular).cache_status == "HIT"


def test_refused_blobs_leave_no_files(
    few_inodes: Path, network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    daemon = start_daemon(CACHE_DIR=str(few_inodes))
    daemon.client.get(put(network, MIB, "popular"))
    free = os.statvfs(few_inodes).f_favail
    for number in range(50):
        assert daemon.client.get(f"{EVIL}/v2/x/y/blobs/sha256:{number:064x}").status == 404
    assert os.statvfs(few_inodes).f_favail >= free - 20


def test_disk_that_another_program_fills(
    small_disk: Path, network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    daemon = start_daemon(CACHE_DIR=str(small_disk))
    popular = put(network, 4 * MIB, "popular")
    assert daemon.client.get(popular).cache_status == "MISS"
    filler = small_disk.parent / "filler"
    with filler.open("wb") as file:
        while os.statvfs(small_disk).f_bavail:
            try:
                file.write(bytes(MIB))
                file.flush()
            except OSError:
                break
    assert daemon.client.get(popular).body == random_bytes(4 * MIB, "popular")
    new = put(network, 6 * MIB, "new")
    for _ in range(2):
        assert daemon.client.get(new).body == random_bytes(6 * MIB, "new")
    filler.unlink()
    for status in ("MISS", "HIT"):
        assert daemon.client.get(new).cache_status == status


def test_blob_larger_than_the_disk(
    small_disk: Path, network: HostileNetwork, start_daemon: StartRegistryDaemon
) -> None:
    """It evicts nothing, because no eviction could make room for it."""
    daemon = start_daemon(CACHE_DIR=str(small_disk))
    urls = [put(network, 8 * MIB, f"{number}") for number in range(3)]
    large = put(network, 70 * MIB, "large")
    for url in urls:
        assert daemon.client.get(url).cache_status == "MISS"
    assert daemon.client.get(large).body == random_bytes(70 * MIB, "large")
    assert [daemon.client.get(url).cache_status for url in urls] == ["HIT"] * 3
    assert "was not cached: CACHE_DIR is full: its disk lacks" in daemon.output_text
    wait_until(lambda: os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize > 20 * MIB, "space is free")

"""Benchmark of a whole pull: `skopeo copy` of an image with many layers, through the proxy and without it.

The copy and skopeo's blob information cache are in memory. On a disk skopeo would wait for seven flushes for each
layer, whichever server the layer comes from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from attrs import frozen

from bench import registry_tree
from bench.measurement import alternate_order, log_progress
from bench.servers import BenchError, BenchServer, find_program
from bench.table import DIRECT, NGINX, PROXY, ResultTable
from bench.testbed import DIRECT_HOST, UPSTREAM_HOST, Testbed

_REPOSITORY, _LAYER_SIZE = "bench/image", 100_000
_MEMORY_FOLDER = "/dev/shm"

_DESTINATIONS = {"oci": "", "dir": ", sequential"}
"""Transports of the copy: into an OCI layout skopeo fetches six layers at a time, as engines do; into a `dir:`, one."""


@frozen
class _ImageSource:
    """A server of the image, and the reference, CA and proxy by which skopeo pulls from it."""

    name: str
    process: BenchServer
    image: str
    ca_file: str
    proxy: str = ""


def image_copy(testbed: Testbed, table: ResultTable) -> None:
    """Copy a cached image, and compare that with a copy from the docker-registry that it was fetched from.

    A third copy comes from an nginx that serves the image as files without CONNECT. Most of its time is skopeo's own.
    """
    storage = testbed.folder / "image"
    tag = registry_tree.write_image(storage, _REPOSITORY, testbed.scale.image_layers, _LAYER_SIZE)
    published = testbed.root / f"v2/{_REPOSITORY}"
    registry_tree.export_as_files(storage, _REPOSITORY, tag, published)
    with testbed.docker_registry(storage) as upstream, testbed.temporary_state() as state:
        port = upstream.endpoint.port
        host, image = f"{UPSTREAM_HOST}:{port}", f"{_REPOSITORY}:{tag}"
        settings = {"REGISTRIES": host, "UPSTREAM_ADDRESSES": f"{host}=127.0.0.1:{port}"}
        with testbed.proxy(state, settings=settings) as proxy_server:
            proxy_url = f"http://127.0.0.1:{proxy_server.endpoint.port}"
            file_server, ca_file = testbed.registry, str(testbed.ca_file)
            sources = [
                _ImageSource(PROXY, proxy_server.process, f"{host}/{image}", proxy_server.endpoint.ca_file, proxy_url),
                _ImageSource(DIRECT, upstream.process, f"{DIRECT_HOST}:{port}/{image}", ca_file),
                _ImageSource(NGINX, file_server.process, f"{DIRECT_HOST}:{file_server.endpoint.port}/{image}", ca_file),
            ]
            copy_image(sources[0], "oci")  # fills the cache
            for round_number in range(testbed.scale.rounds):
                for destination, suffix in _DESTINATIONS.items():
                    case = f"{testbed.scale.image_layers} layers{suffix}"
                    for source in alternate_order(round_number, sources):
                        log_progress("image", case, source.name)
                        cpu_before, duration = source.process.cpu_seconds(), copy_image(source, destination)
                        table.add("image", case, source.name, "duration", "s", duration)
                        table.add(
                            "image", case, source.name, "server CPU", "s", source.process.cpu_seconds() - cpu_before
                        )


def copy_image(source: _ImageSource, destination: str) -> float:
    """Copy the image and return the seconds that this took."""
    skopeo = find_program("skopeo", "skopeo")
    with tempfile.TemporaryDirectory(
        prefix="bench-", dir=_MEMORY_FOLDER if os.access(_MEMORY_FOLDER, os.W_OK) else None
    ) as folder:
        policy = Path(folder) / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": folder,
            "SSL_CERT_FILE": source.ca_file,
            "https_proxy": source.proxy,
            # Run by root, skopeo would otherwise keep its blob information cache below /var/lib instead of HOME.
            "_CONTAINERS_ROOTLESS_UID": "1",
        }
        argv = [
            skopeo,
            "--policy",
            str(policy),
            "copy",
            "--quiet",
            f"docker://{source.image}",
            f"{destination}:{folder}/copy",
        ]
        started = time.monotonic()
        result = subprocess.run(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True
        )
        duration = time.monotonic() - started
    if result.returncode:
        raise BenchError(f"skopeo failed:\n{result.stdout[-2000:]}")
    return duration


def skopeo_version() -> str:
    """Return the version of skopeo, or "no skopeo" if it is not installed."""
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        return "no skopeo"
    return subprocess.run([skopeo, "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()

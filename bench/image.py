"""The measure of a whole pull: `skopeo copy` of an image of many layers, through the proxy and without it.

The copy goes to memory, and so does what skopeo remembers of blobs: it flushes both to the disk, seven times for each
layer, which is not what is measured.
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
from bench.servers import BenchError, BenchServer
from bench.table import DIRECT, NGINX, PROXY, ResultTable
from bench.testbed import DIRECT_HOST, UPSTREAM_HOST, Testbed

_REPOSITORY, _LAYER = "bench/image", 100_000  # bytes of a layer
_MEMORY_FOLDER = "/dev/shm"

_DESTINATIONS = {"oci": "", "dir": ", one by one"}
"""Kinds of copies: skopeo fetches six layers at a time for an OCI layout, as engines do, and for a folder one."""


@frozen
class _ImageSource:
    """How skopeo gets at the image: by which name, trusting which CA, through which proxy, and what serves it."""

    name: str
    process: BenchServer
    image: str
    ca_file: str
    proxy: str = ""


def image_copy(testbed: Testbed, table: ResultTable) -> None:
    """An image that is cached, beside fetching it from the docker-registry that it came from.

    And from an nginx that has it as files, without CONNECT: with that, most of the time is skopeo's own.
    """
    storage = testbed.folder / "image"
    tag = registry_tree.write_image(storage, _REPOSITORY, testbed.scale.image_layers, _LAYER)
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
            copy_image(sources[0], "oci")  # which caches it
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
    """Return the seconds that a copy took."""
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        raise BenchError("skopeo is missing: the Debian package of that name has it.")
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
            "_CONTAINERS_ROOTLESS_UID": "1",  # root's skopeo would remember blobs below /var/lib instead of HOME
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
    """Return the version of skopeo, where there is one."""
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        return "no skopeo"
    return subprocess.run([skopeo, "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()

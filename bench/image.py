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

from bench import tree
from bench.measures import tell, turned
from bench.servers import BenchError, Server
from bench.stage import HOST, OTHER_HOST, Stage
from bench.table import DIRECT, NGINX, PROXY, Table

_REPOSITORY, _LAYER = "bench/image", 100_000  # bytes of a layer
_MEMORY = "/dev/shm"

_KINDS = {"oci": "", "dir": ", one by one"}
"""Kinds of copies: skopeo fetches six layers at a time for an OCI layout, as engines do, and for a folder one."""


@frozen
class _Way:
    """How skopeo gets at the image: by which name, trusting which CA, through which proxy, and what serves it."""

    name: str
    server: Server
    image: str
    ca_file: str
    proxy: str = ""


def image(stage: Stage, table: Table) -> None:
    """An image that is cached, beside fetching it from the docker-registry that it came from.

    And from an nginx that has it as files, without CONNECT: with that, most of the time is skopeo's own.
    """
    storage = stage.folder / "image"
    tag = tree.plant(storage, _REPOSITORY, stage.scale.layers, _LAYER)
    published = stage.root / f"v2/{_REPOSITORY}"
    tree.publish(storage, _REPOSITORY, tag, published)
    with stage.docker_registry(storage) as upstream, stage.fresh_state() as state:
        port = upstream.target.port
        host, image = f"{HOST}:{port}", f"{_REPOSITORY}:{tag}"
        settings = {"REGISTRIES": host, "UPSTREAM_ADDRESSES": f"{host}=127.0.0.1:{port}"}
        with stage.proxy(state, settings=settings) as ours:
            through = f"http://127.0.0.1:{ours.target.port}"
            files, ca_file = stage.registry, str(stage.ca_file)
            ways = [
                _Way(PROXY, ours.server, f"{host}/{image}", ours.target.ca_file, through),
                _Way(DIRECT, upstream.server, f"{OTHER_HOST}:{port}/{image}", ca_file),
                _Way(NGINX, files.server, f"{OTHER_HOST}:{files.target.port}/{image}", ca_file),
            ]
            _copy(ways[0], "oci")  # which caches it
            for round_ in range(stage.scale.rounds):
                for kind, how in _KINDS.items():
                    case = f"{stage.scale.layers} layers{how}"
                    for way in turned(round_, ways):
                        tell("image", case, way.name)
                        used, took = way.server.cpu(), _copy(way, kind)
                        table.add("image", case, way.name, "duration", "s", took)
                        table.add("image", case, way.name, "server CPU", "s", way.server.cpu() - used)


def _copy(way: _Way, kind: str) -> float:
    """Return the seconds that a copy took."""
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        raise BenchError("skopeo is missing: the Debian package of that name has it.")
    with tempfile.TemporaryDirectory(prefix="bench-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as folder:
        policy = Path(folder) / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": folder,
            "SSL_CERT_FILE": way.ca_file,
            "https_proxy": way.proxy,
            "_CONTAINERS_ROOTLESS_UID": "1",  # root's skopeo would remember blobs below /var/lib instead of HOME
        }
        argv = [skopeo, "--policy", str(policy), "copy", "--quiet", f"docker://{way.image}", f"{kind}:{folder}/copy"]
        began = time.monotonic()
        done = subprocess.run(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True
        )
        took = time.monotonic() - began
    if done.returncode:
        raise BenchError(f"skopeo failed:\n{done.stdout[-2000:]}")
    return took


def skopeo_version() -> str:
    """Return the version of skopeo, where there is one."""
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        return "no skopeo"
    return subprocess.run([skopeo, "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()

"""The measure of a whole pull: `skopeo copy` of an image of many layers, through the proxy and without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from attrs import frozen

from bench import tree
from bench.measures import tell, turned
from bench.servers import BenchError, Server
from bench.stage import HOST, OTHER_HOST, Stage
from bench.table import DIRECT, PROXY, Table

_REPOSITORY, _LAYER = "bench/image", 100_000  # bytes of a layer


@frozen
class _Way:
    """How skopeo gets at the image: by which name, trusting which CA, through which proxy, and what serves it."""

    name: str
    server: Server
    image: str
    ca_file: str
    proxy: str = ""


def image(stage: Stage, table: Table) -> None:
    """An image that is cached, beside fetching it from the docker-registry that it came from."""
    storage, case = stage.folder / "image", f"{stage.scale.layers} layers"
    tag = tree.plant(storage, _REPOSITORY, stage.scale.layers, _LAYER)
    with stage.docker_registry(storage) as upstream, stage.fresh_state() as state:
        port = upstream.target.port
        host, image = f"{HOST}:{port}", f"{_REPOSITORY}:{tag}"
        settings = {"REGISTRIES": host, "UPSTREAM_ADDRESSES": f"{host}=127.0.0.1:{port}"}
        with stage.proxy(state, settings=settings) as ours:
            through = f"http://127.0.0.1:{ours.target.port}"
            ways = [
                _Way(PROXY, ours.server, f"{host}/{image}", ours.target.ca_file, through),
                _Way(DIRECT, upstream.server, f"{OTHER_HOST}:{port}/{image}", str(stage.ca_file)),
            ]
            _copy(stage, ways[0])  # which caches it
            for round_ in range(stage.scale.rounds):
                for way in turned(round_, ways):
                    tell("image", case, way.name)
                    used, took = way.server.cpu(), _copy(stage, way)
                    table.add("image", case, way.name, "duration", "s", took)
                    table.add("image", case, way.name, "server CPU", "s", way.server.cpu() - used)
    shutil.rmtree(storage)


def _copy(stage: Stage, way: _Way) -> float:
    """Return the seconds that a copy took."""
    skopeo, folder, policy = shutil.which("skopeo"), stage.folder / "copy", stage.folder / "policy.json"
    if skopeo is None:
        raise BenchError("skopeo is missing: the Debian package of that name has it.")
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(stage.folder),
        "SSL_CERT_FILE": way.ca_file,
        "https_proxy": way.proxy,
    }
    argv = [skopeo, "--policy", str(policy), "copy", "--quiet", f"docker://{way.image}", f"dir:{folder}"]
    began = time.monotonic()
    done = subprocess.run(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, text=True
    )
    took = time.monotonic() - began
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        raise BenchError(f"skopeo failed:\n{done.stdout[-2000:]}")
    return took


def skopeo_version() -> str:
    """Return the version of skopeo, where there is one."""
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        return "no skopeo"
    return subprocess.run([skopeo, "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()

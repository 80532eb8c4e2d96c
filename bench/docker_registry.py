"""Debian's docker-registry (CNCF distribution), the peer of the hosted registry."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bench.pki import ServerCertificate
from bench.servers import BenchServer, find_program


def file_storage(folder: Path) -> dict[str, object]:
    """Return the storage of a registry that stores its content in `folder`."""
    return {"filesystem": {"rootdirectory": str(folder)}, "delete": {"enabled": True}}


def write_configuration(folder: Path, port: int, storage: Mapping[str, object], certificate: ServerCertificate) -> Path:
    """Write the configuration of a registry with `storage`, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    tls = {"certificate": str(certificate.file), "key": str(certificate.key_file)}
    configuration = folder / "config.yml"
    configuration.write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "warn", "accesslog": {"disabled": True}},
                "storage": storage,
                "http": {"addr": f"127.0.0.1:{port}", "secret": "not a secret", "tls": tls},
            }
        )
    )
    return configuration


def make_server(folder: Path, configuration: Path, port: int) -> BenchServer:
    """Return a docker-registry that is not started yet."""
    # It panics if a CA for AWS is set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return BenchServer([_find_program(), "serve", str(configuration)], folder, environment, [port])


def garbage_collect_command(configuration: Path) -> list[str]:
    """Return the command that collects garbage. Its manual forbids pushes while it runs."""
    return [_find_program(), "garbage-collect", str(configuration)]


def version() -> str:
    """Return the version of docker-registry."""
    output = subprocess.run([_find_program(), "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout
    return f"docker-registry {output.split()[-1]}"


def _find_program() -> str:
    return find_program("docker-registry", "docker-registry")

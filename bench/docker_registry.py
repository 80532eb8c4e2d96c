"""Debian's docker-registry, which is CNCF distribution: what the hosted registry is measured against."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from bench.pki import Certificate
from bench.servers import BenchError, Server


def configure(folder: Path, port: int, storage: Path, certificate: Certificate) -> Path:
    """Write the configuration of a registry that keeps what it has in `storage`; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    tls = {"certificate": str(certificate.file), "key": str(certificate.key_file)}
    configuration = folder / "config.yml"
    configuration.write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "warn", "accesslog": {"disabled": True}},
                "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
                "http": {"addr": f"127.0.0.1:{port}", "secret": "of nobody", "tls": tls},
            }
        )
    )
    return configuration


def serve(folder: Path, configuration: Path, port: int) -> Server:
    """Return a registry that is not started yet."""
    return Server([_program(), "serve", str(configuration)], folder, dict(os.environ), [port])


def collecting(configuration: Path) -> list[str]:
    """Return the command that collects garbage; its manual wants that nobody pushes meanwhile."""
    return [_program(), "garbage-collect", str(configuration)]


def version() -> str:
    """Return the version of docker-registry."""
    text = subprocess.run([_program(), "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout
    return f"docker-registry {text.split()[-1]}"


def _program() -> str:
    found = shutil.which("docker-registry")
    if found is None:
        raise BenchError("docker-registry is missing: the Debian package of that name has it.")
    return found

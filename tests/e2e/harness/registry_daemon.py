"""A daemon with the hosted registry on all endpoints, its htpasswd file, and images in folders for skopeo, podman."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.servers import free_port
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.images import SampleImage

HOSTED_REGISTRY_HOST = "docker-registry.local"

USERS = {"alice": "wonder:land", "bob": "x" * 80}


class RegistryDaemon(TwistdDaemon):
    """A daemon that serves the hosted registry on a plain HTTP port too."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.http_port = free_port()
        super().__init__(folder, {"REGISTRY_HTTP_LISTEN": f"tcp:{self.http_port}:interface=127.0.0.1", **settings})

    @property
    def http_address(self) -> str:
        """The registry's address without TLS."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def https_address(self) -> str:
        """The registry's address over TLS. Go programs use no proxy for it, because it is a loopback address."""
        return f"127.0.0.1:{self.registry_port}"


def write_htpasswd(folder: Path) -> Path:
    """Write a file for HTPASSWD_FILE with `USERS`, and return its path."""
    import bcrypt  # only this function needs it

    lines = [
        f"{user}:{bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(4)).decode()}"
        for user, password in USERS.items()
    ]
    file = folder / "htpasswd"
    file.write_text("\n".join(["# users", *lines, ""]))
    return file


def write_image_folder(image: SampleImage, folder: Path) -> Path:
    """Write `image` to `folder` in the format of the `dir:` transport of skopeo and podman; return the folder."""
    folder.mkdir()
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    for child in image.children_first():
        name = "manifest.json" if child is image else f"{child.digest.partition(':')[2]}.manifest.json"
        (folder / name).write_bytes(child.manifest.data)
        for blob in child.blobs:
            (folder / blob.digest.partition(":")[2]).write_bytes(blob.data)
    return folder

"""The hosted registry as its clients know it: its doors, its users, and images as the programs that push have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.servers import free_port
from tests.e2e.harness.daemon import TwistdDaemon
from tests.e2e.harness.images import SampleImage

HOSTED_REGISTRY_HOST = "docker-registry.local"

USERS = {"alice": "wonder:land", "bob": "x" * 80}


class RegistryDaemon(TwistdDaemon):
    """A daemon that has the hosted registry on a plain port too."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.http_port = free_port()
        super().__init__(folder, {"REGISTRY_HTTP_LISTEN": f"tcp:{self.http_port}:interface=127.0.0.1", **settings})

    @property
    def http_address(self) -> str:
        """The registry's name without TLS."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def https_address(self) -> str:
        """Its name over TLS, by no proxy: programs in Go ask none for loopback addresses."""
        return f"127.0.0.1:{self.registry_port}"


def write_htpasswd(folder: Path) -> Path:
    """Return a file for HTPASSWD_FILE with `USERS`."""
    import bcrypt  # not needed by what else is here

    lines = [
        f"{user}:{bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(4)).decode()}"
        for user, password in USERS.items()
    ]
    file = folder / "htpasswd"
    file.write_text("\n".join(["# users", *lines, ""]))
    return file


def write_image_folder(image: SampleImage, folder: Path) -> Path:
    """Return `image` as the dir: transport of skopeo and podman has it."""
    folder.mkdir()
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    for child in image.children_first():
        name = "manifest.json" if child is image else f"{child.digest.partition(':')[2]}.manifest.json"
        (folder / name).write_bytes(child.manifest.data)
        for blob in child.blobs:
            (folder / blob.digest.partition(":")[2]).write_bytes(blob.data)
    return folder

"""The hosted registry as its clients know it: its doors, its users, and images as the programs that push have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.servers import free_port
from tests.e2e.house.daemon import Proxy
from tests.e2e.house.images import Image

OWN = "docker-registry.local"

USERS = {"alice": "wonder:land", "bob": "x" * 80}


class Hosting(Proxy):
    """A daemon that has the hosted registry on a plain port too."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.plain_port = free_port()
        super().__init__(folder, {"REGISTRY_HTTP_LISTEN": f"tcp:{self.plain_port}:interface=127.0.0.1", **settings})

    @property
    def plain(self) -> str:
        """The registry's name without TLS."""
        return f"127.0.0.1:{self.plain_port}"

    @property
    def straight(self) -> str:
        """Its name over TLS, by no proxy: programs in Go ask none for loopback addresses."""
        return f"127.0.0.1:{self.registry_port}"


def users_file(folder: Path) -> Path:
    """Return a file for HTPASSWD_FILE with `USERS`."""
    import bcrypt  # not needed by what else is here

    lines = [
        f"{user}:{bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(4)).decode()}"
        for user, password in USERS.items()
    ]
    file = folder / "htpasswd"
    file.write_text("\n".join(["# users", *lines, ""]))
    return file


def folder_of(image: Image, folder: Path) -> Path:
    """Return `image` as the dir: transport of skopeo and podman has it."""
    folder.mkdir()
    (folder / "version").write_text("Directory Transport Version: 1.1\n")
    for part in image.walk():
        name = "manifest.json" if part is image else f"{part.digest.partition(':')[2]}.manifest.json"
        (folder / name).write_bytes(part.manifest.data)
        for blob in part.blobs:
            (folder / blob.digest.partition(":")[2]).write_bytes(blob.data)
    return folder

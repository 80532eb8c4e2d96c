"""Real clients with storage of their own, configured with a proxy or a mirror only."""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from bench.servers import free_port
from tests.e2e.harness.process import BackgroundProcess, require_programs

_ENTER = Path(__file__).resolve().parents[2] / "clients" / "enter"


@frozen
class Machine:
    """The place of a client's programs: this machine, or the root directory `tree` of another Debian release.

    Programs in a tree see `folder`, which has all files of the test, at its own path.
    """

    tree: Path | None = None
    folder: Path = Path("/nonexistent")

    def require(self, *programs: str, root: bool = False) -> None:
        """Skip the test with a reason if a program, or root's rights, are missing."""
        if self.tree is None:
            require_programs(*programs, root=root)

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` on this machine."""
        return list(argv) if self.tree is None else [str(_ENTER), str(self.tree), str(self.folder), *argv]


THIS_MACHINE = Machine()

_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
"""The architecture of this machine in the words of OCI."""

_UNPACK_BY_NATIVE_SNAPSHOTTER = f"""
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "linux/{_ARCHITECTURE}"
snapshotter = "native"
"""


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the proxy, CA and login settings of the user that runs the tests."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **extra}


def run(
    argv: Sequence[str], environment: Mapping[str, str], *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command, wait for its end, and return its output as text."""
    return subprocess.run(
        list(argv), env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        check=False,
    )  # fmt: skip


def check_output(result: subprocess.CompletedProcess[str]) -> str:
    """Return the command's stdout. Fail with its whole output if its exit status is not 0."""
    assert result.returncode == 0, f"{result.args}\n{result.stdout}{result.stderr}"
    return result.stdout


def mirror_table(host: str, location: str) -> str:
    """Return the table of a registries.conf by which images of `host` are pulled from the mirror at `location`."""
    return f"""
[[registry]]
location = "{host}"
[[registry.mirror]]
location = "{location}"
insecure = true
"""


class Skopeo:
    """skopeo with its home in `folder`."""

    def __init__(self, folder: Path, environment: Mapping[str, str], machine: Machine = THIS_MACHINE) -> None:
        machine.require("skopeo")
        self._machine = machine
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "registries.conf").write_text('unqualified-search-registries = ["docker.io"]\n')
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._environment = clean_environment(
            {
                **environment,
                "HOME": str(folder),
                "XDG_RUNTIME_DIR": str(folder),
                "TMPDIR": str(folder),
            }
        )
        self._pull_count = 0

    def configure_mirror(self, host: str, location: str) -> None:
        """Pull images of `host` from the mirror at `location`, over plain HTTP."""
        self.configure_registries(mirror_table(host, location))

    def configure_registries(self, text: str) -> None:
        """Append `text` to registries.conf."""
        with (self._folder / "registries.conf").open("a") as file:
            file.write(text)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        base = ["skopeo", "--policy", str(self._folder / "policy.json"), "--registries.d", str(self._folder)]
        base += ["--registries-conf", str(self._folder / "registries.conf")]
        return run(self._machine.command([*base, *arguments]), self._environment)

    def pull(self, image: str, *options: str, plain_http: bool = False) -> Path:
        """Copy `image` to a new folder and return the folder. skopeo verifies every digest."""
        self._pull_count += 1
        target = self._folder / f"pulled-{self._pull_count}"
        insecure = ["--src-tls-verify=false"] if plain_http else []
        check_output(self.run("copy", *insecure, *options, f"docker://{image}", f"dir:{target}"))
        return target

    def try_pull(self, image: str, *options: str) -> subprocess.CompletedProcess[str]:
        self._pull_count += 1
        return self.run("copy", *options, f"docker://{image}", f"dir:{self._folder}/pulled-{self._pull_count}")

    def inspect_raw(self, image: str) -> bytes:
        """Return the manifest's bytes."""
        return check_output(self.run("inspect", "--raw", f"docker://{image}")).encode()


class Podman:
    """podman with its home and storage in `folder`. The path must be short."""

    PROGRAM = "podman"

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        machine: Machine = THIS_MACHINE,
        *,
        partial_images: bool = False,
    ) -> None:
        machine.require(self.PROGRAM, root=True)
        self._machine = machine
        (folder / ".config/containers").mkdir(parents=True, exist_ok=True)
        (folder / "storage.conf").write_text(
            f"""
            [storage]
            driver = "{"overlay" if partial_images else "vfs"}"
            graphroot = "{folder}/root"
            runroot = "{folder}/run"
            [storage.options]
            pull_options = {{enable_partial_images = "{str(partial_images).lower()}"}}
            """
        )
        (folder / ".config/containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        (folder / "registries.conf").write_text('unqualified-search-registries = ["docker.io"]\n')
        self._folder = folder
        self._environment = clean_environment(
            {
                **environment,
                "HOME": str(folder),
                "XDG_RUNTIME_DIR": str(folder),
                "TMPDIR": str(folder),
                "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
                "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            }
        )

    def configure_mirror(self, host: str, location: str) -> None:
        """Pull images of `host` from the mirror at `location`, over plain HTTP."""
        self.configure_registries(mirror_table(host, location))

    def configure_registries(self, text: str) -> None:
        """Append `text` to registries.conf."""
        with (self._folder / "registries.conf").open("a") as file:
            file.write(text)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(self._machine.command([self.PROGRAM, *arguments]), self._environment)


class Buildah(Podman):
    """buildah, which reads the same configuration as podman."""

    PROGRAM = "buildah"


class Docker(BackgroundProcess):
    """A dockerd with its own storage and socket.

    `environment` is that of dockerd. The docker command has none of it, unless `command_environment` is given.
    `containerd_store` makes dockerd keep images in containerd, the default of Docker 29, instead of a graph driver.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        machine: Machine = THIS_MACHINE,
        *,
        insecure: Sequence[str] = (),
        mirrors: Sequence[str] = (),
        command_environment: Mapping[str, str] | None = None,
        containerd_store: bool = False,
    ) -> None:
        machine.require("dockerd", "docker", "containerd", root=True)
        self._machine = machine
        self._command_environment = dict(command_environment or {})
        folder.mkdir(parents=True, exist_ok=True)
        self._host = f"unix://{folder}/docker.sock"
        self._home = folder / "home"
        self._home.mkdir(exist_ok=True)
        (folder / "daemon.json").write_text(
            json.dumps(
                {
                    "data-root": str(folder / "root"),
                    "exec-root": str(folder / "exec"),
                    "hosts": [self._host],
                    "pidfile": str(folder / "pid"),
                    "storage-driver": "native" if containerd_store else "vfs",
                    "features": {"containerd-snapshotter": containerd_store},
                    "bridge": "none",
                    "iptables": False,
                    "ip6tables": False,
                    "insecure-registries": list(insecure),
                    "registry-mirrors": list(mirrors),
                }
            )
        )
        argv = machine.command(["dockerd", "--config-file", str(folder / "daemon.json")])
        super().__init__(argv, folder / "log", clean_environment({**environment, "HOME": str(self._home)}), folder)

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(lambda: self.run("version").returncode == 0)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**self._command_environment, "HOME": str(self._home), "DOCKER_HOST": self._host}
        return run(self._machine.command(["docker", *arguments]), clean_environment(environment))

    def run_checked(self, *arguments: str) -> str:
        """Run a docker command that must succeed, and return its output."""
        return check_output(self.run(*arguments))

    def write_login(self, registry: str, user: str, password: str) -> None:
        """Store a login in the form of `docker login` without a credential helper."""
        auth = base64.b64encode(f"{user}:{password}".encode()).decode()
        folder = self._home / ".docker"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"auths": {registry: {"auth": auth}}}))

    def image_digest(self, image: str) -> str:
        """Return the digest of the manifest that `image` was pulled by."""
        digests = json.loads(self.run_checked("image", "inspect", "--format", "{{json .RepoDigests}}", image))
        return str(digests[0].partition("@")[2])

    def remove_all_images(self) -> None:
        """Remove every image, so that the next pull downloads all layers."""
        images = self.run_checked("images", "-aq").split()
        if images:
            self.run_checked("rmi", "-f", *dict.fromkeys(images))


class Containerd(BackgroundProcess):
    """A containerd with its own storage and socket, controlled with ctr."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        machine: Machine = THIS_MACHINE,
        *,
        cri: bool = False,
    ) -> None:
        machine.require("containerd", "ctr", root=True)
        self._machine = machine
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.address = str(folder / "sock")
        self._environment = clean_environment(environment or {})
        disabled_plugins = [f"io.containerd.snapshotter.v1.{name}" for name in ("aufs", "btrfs", "devmapper", "zfs")]
        if not cri:
            disabled_plugins.append("io.containerd.grpc.v1.cri")
        # ctr of containerd 2 lets the daemon unpack. The CRI of containerd 2 unpacks with the default snapshotter.
        unpacking = "" if cri else _UNPACK_BY_NATIVE_SNAPSHOTTER
        (folder / "config.toml").write_text(f"""\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = {json.dumps(disabled_plugins)}
[grpc]
address = "{self.address}"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{folder}/hosts"
{unpacking}""")
        argv = machine.command(["containerd", "--config", str(folder / "config.toml")])
        super().__init__(argv, folder / "log", self._environment, folder)

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(lambda: self.ctr("version").returncode == 0)

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(self._machine.command(["ctr", "--address", self.address, *arguments]), self._environment)

    def configure_mirror(self, host: str, url: str) -> None:
        """Make containerd fetch images of `host` only from the mirror `url`; the host itself is a closed port."""
        unreachable_server = f'server = "http://127.0.0.1:{free_port()}"\n'
        self.configure_host(host, f'{unreachable_server}[host."{url}"]\n  capabilities = ["pull", "resolve"]\n')

    def configure_ca(self, host: str, ca_file: Path) -> None:
        """Make containerd use TLS for `host`, and trust the CA in `ca_file`."""
        capabilities = f'capabilities = ["pull", "resolve", "push"]\n  ca = "{ca_file}"'
        self.configure_host(host, f'server = "https://{host}"\n[host."https://{host}"]\n  {capabilities}\n')

    def configure_host(self, host: str, content: str) -> None:
        """Write the hosts.toml of `host`."""
        folder = self._folder / "hosts" / host
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts.toml").write_text(content)

    def _hosts_dir_options(self) -> list[str]:
        return ["--hosts-dir", str(self._folder / "hosts")] if (self._folder / "hosts").exists() else []

    def try_push(self, image: str, source: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Push the local image `source` as `image`."""
        return self.ctr("images", "push", *self._hosts_dir_options(), *options, image, source)

    def try_pull(self, image: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.ctr("images", "pull", "--snapshotter", "native", *self._hosts_dir_options(), *options, image)

    def pull(self, image: str, *options: str) -> None:
        """Pull and unpack `image`."""
        check_output(self.try_pull(image, *options))

    def remove_all_images(self, namespace: str = "default") -> None:
        """Remove every image and its content, so that the next pull downloads all layers."""
        options = ("--namespace", namespace)
        names = check_output(self.ctr(*options, "images", "ls", "-q")).split()
        if names:
            check_output(self.ctr(*options, "images", "rm", "--sync", *names))

    def image_digest(self, image: str) -> str:
        for line in check_output(self.ctr("images", "ls")).splitlines()[1:]:
            if line.split()[0] == image:
                return line.split()[2]
        raise AssertionError(f"containerd has no image {image}")

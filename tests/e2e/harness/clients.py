"""Real clients with storage of their own: skopeo, podman, dockerd and containerd, configured with a proxy only."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.servers import free_port
from tests.e2e.harness.process import BackgroundProcess, require_programs


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

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        require_programs("skopeo")
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
        with (self._folder / "registries.conf").open("a") as file:
            file.write(mirror_table(host, location))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        base = ["skopeo", "--policy", str(self._folder / "policy.json"), "--registries.d", str(self._folder)]
        base += ["--registries-conf", str(self._folder / "registries.conf")]
        return run([*base, *arguments], self._environment)

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

    def __init__(self, folder: Path, environment: Mapping[str, str], *, partial_images: bool = False) -> None:
        require_programs("podman", root=True)
        folder.mkdir(parents=True, exist_ok=True)
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
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
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
        with (self._folder / "registries.conf").open("a") as file:
            file.write(mirror_table(host, location))

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        policy = [f"--signature-policy={self._folder}/policy.json"] if command == "pull" else []
        return run(["podman", command, *policy, *arguments], self._environment)


class Docker(BackgroundProcess):
    """A dockerd with its own storage and socket."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], *, insecure: Sequence[str] = (), mirrors: Sequence[str] = ()
    ) -> None:
        require_programs("dockerd", "docker", "containerd", root=True)
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
                    "storage-driver": "vfs",
                    "bridge": "none",
                    "iptables": False,
                    "ip6tables": False,
                    "insecure-registries": list(insecure),
                    "registry-mirrors": list(mirrors),
                }
            )
        )
        argv = ["dockerd", "--config-file", str(folder / "daemon.json")]
        super().__init__(argv, folder / "log", clean_environment({**environment, "HOME": str(self._home)}), folder)

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(lambda: self.run("version").returncode == 0)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = clean_environment({"HOME": str(self._home), "DOCKER_HOST": self._host})
        return run(["docker", *arguments], environment)

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

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        require_programs("containerd", "ctr", root=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._address = str(folder / "sock")
        self._environment = clean_environment(environment or {})
        (folder / "config.toml").write_text(f"""\
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{self._address}"
""")
        argv = ["containerd", "--config", str(folder / "config.toml")]
        super().__init__(argv, folder / "log", self._environment, folder)

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(lambda: self.ctr("version").returncode == 0)

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(["ctr", "--address", self._address, *arguments], self._environment)

    def configure_mirror(self, host: str, url: str) -> None:
        """Make containerd fetch images of `host` only from the mirror `url`; the host itself is a closed port."""
        unreachable_server = f'server = "http://127.0.0.1:{free_port()}"\n'
        self._write_hosts_file(host, f'{unreachable_server}[host."{url}"]\n  capabilities = ["pull", "resolve"]\n')

    def configure_ca(self, host: str, ca_file: Path) -> None:
        """Make containerd use TLS for `host`, and trust the CA in `ca_file`."""
        capabilities = f'capabilities = ["pull", "resolve", "push"]\n  ca = "{ca_file}"'
        self._write_hosts_file(host, f'server = "https://{host}"\n[host."https://{host}"]\n  {capabilities}\n')

    def _write_hosts_file(self, host: str, content: str) -> None:
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

    def remove_all_images(self) -> None:
        """Remove every image and its content, so that the next pull downloads all layers."""
        names = check_output(self.ctr("images", "ls", "-q")).split()
        if names:
            check_output(self.ctr("images", "rm", "--sync", *names))

    def image_digest(self, image: str) -> str:
        for line in check_output(self.ctr("images", "ls")).splitlines()[1:]:
            if line.split()[0] == image:
                return line.split()[2]
        raise AssertionError(f"containerd has no image {image}")

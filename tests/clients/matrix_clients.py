"""The clients of the matrix. Each pulls an image by its reference, forgets what it has, and pushes an image."""

from __future__ import annotations

import json
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

from attrs import frozen

from tests.clients.upstream_set import login_file
from tests.e2e.harness.clients import (
    Buildah,
    Containerd,
    Docker,
    Machine,
    Podman,
    Skopeo,
    check_output,
    clean_environment,
    run,
)

Logins = Mapping[str, tuple[str, str]]
"""The user and the password for each host."""

_WITHOUT_LOGIN = ("docker.io", "redirecting.test", "shared.test")
"""The registries that need no login of the client's own: it has none for its mirror."""

Result = subprocess.CompletedProcess[str]


@frozen
class Network:
    """The way to the registries: the environment of the engines, and of the commands that run beside an engine.

    `mirror` is the address of a mirror, as host:port, for clients that are configured with one.
    """

    engine: Mapping[str, str]
    command: Mapping[str, str]
    mirror: str = ""


class MatrixClient(ABC):
    """A client with storage in `folder`, like a new machine."""

    TITLE: ClassVar[str]
    PACKAGE: ClassVar[str]
    """The Debian package with its program."""
    MISSING_IN: ClassVar[Collection[str]] = ()
    """The Debian releases that have no such package."""
    CAN_PUSH: ClassVar[bool] = True
    MIRRORED_HOSTS: ClassVar[Collection[str]] = ()
    """The registries for which it is configured with a mirror. If there are any, it reaches nothing else."""
    FETCHES_TOKENS_BY_ITSELF: ClassVar[bool] = False
    """Its command asks token servers, past the proxy. While they are stopped nobody can give it a token."""
    ENGINE_GOES_DIRECTLY: ClassVar[bool] = False
    """Only its command uses the proxy, so nothing is cached."""

    def __init__(self, machine: Machine, folder: Path, network: Network) -> None:
        self.machine = machine
        self.folder = folder
        self.network = network
        self._pull_count = 0

    @property
    def uses_mirror(self) -> bool:
        """True if the client has a mirror configured, which it has not while it goes directly."""
        return bool(self.MIRRORED_HOSTS and self.network.mirror)

    def start(self) -> None:
        """Create the storage, and start the engine if there is one."""
        self.folder.mkdir()

    def stop(self) -> None:
        """Stop the engine if there is one, and remove the storage."""
        shutil.rmtree(self.folder)

    @abstractmethod
    def pull(self, reference: str, logins: Logins) -> Result: ...

    @abstractmethod
    def forget(self) -> None:
        """Remove all images, so that the next pull downloads everything again."""

    def push(self, source: str, target: str, logins: Logins) -> Result:
        """Push the image that was pulled as `source` under the name `target`. Raise TypeError if the client cannot."""
        raise TypeError(f"{type(self).__name__} pushes no images")

    def write_logins(self, logins: Logins) -> Path:
        """Write a `config.json` with `logins`, and return its path."""
        file = self.folder / "login/config.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(login_file(logins)))
        return file

    def new_folder(self) -> Path:
        """Return the path of a folder that does not exist, for what the next pull stores."""
        self._pull_count += 1
        return self.folder / f"pulled-{self._pull_count}"

    @property
    def last_folder(self) -> Path:
        return self.folder / f"pulled-{self._pull_count}"


class SkopeoClient(MatrixClient):
    """skopeo, which copies all platforms of an image."""

    TITLE, PACKAGE = "skopeo copy", "skopeo"

    def start(self) -> None:
        super().start()
        self.skopeo = Skopeo(self.folder / "skopeo", self.network.engine, self.machine)

    def pull(self, reference: str, logins: Logins) -> Result:
        login = f"--src-authfile={self.write_logins(logins)}"
        return self.skopeo.run("copy", "--all", login, f"docker://{reference}", f"dir:{self.new_folder()}")

    def forget(self) -> None:
        shutil.rmtree(self.last_folder)

    def push(self, source: str, target: str, logins: Logins) -> Result:
        login = f"--dest-authfile={self.write_logins(logins)}"
        return self.skopeo.run("copy", "--all", login, f"dir:{self.last_folder}", f"docker://{target}")


class PodmanClient(MatrixClient):
    """podman pull and push."""

    TITLE, PACKAGE = "podman pull", "podman"
    ENGINE: ClassVar[type[Podman]] = Podman

    def start(self) -> None:
        super().start()
        self.podman = self.ENGINE(self.folder / "p", self.network.engine, self.machine)

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.podman.run("pull", "--authfile", str(self.write_logins(logins)), reference)

    def forget(self) -> None:
        check_output(self.podman.run("rmi", "--all", "--force"))

    def push(self, source: str, target: str, logins: Logins) -> Result:
        return self.podman.run("push", "--authfile", str(self.write_logins(logins)), source, target)


class BuildahClient(PodmanClient):
    """buildah pull and push."""

    TITLE, PACKAGE, ENGINE = "buildah pull", "buildah", Buildah


class PodmanBuildClient(PodmanClient):
    """podman build."""

    TITLE, CAN_PUSH = "podman build FROM", False

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.podman.run(
            "build", "--authfile", str(self.write_logins(logins)), write_build_context(self.folder, reference)
        )


class MirroredPodmanClient(PodmanClient):
    """podman with the mirrors of the README in registries.conf, which CRI-O reads too."""

    TITLE, CAN_PUSH, MIRRORED_HOSTS = "podman pull, registries.conf", False, _WITHOUT_LOGIN

    def start(self) -> None:
        super().start()
        for host in self.MIRRORED_HOSTS if self.uses_mirror else ():
            self.podman.configure_mirror(host, f"{self.network.mirror}/{host}")


class MirroredBuildahClient(MirroredPodmanClient):
    """buildah with the same file."""

    TITLE, PACKAGE, ENGINE = "buildah pull, registries.conf", "buildah", Buildah


class DockerClient(MatrixClient):
    """docker pull and push, with a graph driver."""

    TITLE, PACKAGE = "docker pull", "docker.io"
    CONTAINERD_STORE: ClassVar[bool] = False
    COMMAND_USES_PROXY: ClassVar[bool] = False
    COMMAND_ENVIRONMENT: ClassVar[Mapping[str, str]] = {}

    def start(self) -> None:
        super().start()
        self.docker = Docker(
            self.folder / "d",
            self.network.command if self.ENGINE_GOES_DIRECTLY else self.network.engine,
            self.machine,
            command_environment={
                **(self.network.engine if self.COMMAND_USES_PROXY else self.network.command),
                **self.COMMAND_ENVIRONMENT,
            },
            containerd_store=self.CONTAINERD_STORE,
            mirrors=[f"http://{self.network.mirror}"] if self.uses_mirror else [],
        )
        self.docker.start()

    def stop(self) -> None:
        self.docker.stop()
        super().stop()

    def run(self, logins: Logins, *arguments: str) -> Result:
        return self.docker.run("--config", str(self.write_logins(logins).parent), *arguments)

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.run(logins, "pull", reference)

    def forget(self) -> None:
        self.docker.remove_all_images()

    def push(self, source: str, target: str, logins: Logins) -> Result:
        self.docker.run_checked("tag", source, target)
        return self.run(logins, "push", target)


class DockerContainerdClient(DockerClient):
    """docker with the containerd image store, the default of Docker 29."""

    TITLE, CONTAINERD_STORE = "docker pull, containerd image store", True


class MirroredDockerClient(DockerClient):
    """dockerd with registry-mirrors."""

    TITLE, CAN_PUSH, MIRRORED_HOSTS = "docker pull, registry-mirrors", False, ("docker.io",)


class ClassicBuildClient(DockerClient):
    """docker build by dockerd's first builder."""

    TITLE, CAN_PUSH, COMMAND_ENVIRONMENT = "docker build FROM, classic builder", False, {"DOCKER_BUILDKIT": "0"}

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.run(logins, "build", write_build_context(self.folder, reference))


class BuildxClient(DockerClient):
    """docker buildx build by the BuildKit in dockerd; the docker command, which fetches tokens, uses no proxy."""

    TITLE, PACKAGE, FETCHES_TOKENS_BY_ITSELF = "docker buildx build FROM", "docker-buildx", True

    def pull(self, reference: str, logins: Logins) -> Result:
        context = write_build_context(self.folder, reference)
        return self.run(logins, "buildx", "build", "--progress=plain", "--tag=built", context)

    def forget(self) -> None:
        super().forget()
        self.docker.run_checked("buildx", "prune", "--all", "--force")

    def push(self, source: str, target: str, logins: Logins) -> Result:
        context = write_build_context(self.folder, source)
        return self.run(logins, "buildx", "build", "--progress=plain", "--push", f"--tag={target}", context)


class BuildxContainerdClient(BuildxClient):
    """The same with the containerd image store."""

    TITLE, CONTAINERD_STORE = "docker buildx build FROM, containerd image store", True


class ProxiedBuildxClient(BuildxClient):
    """The same, and the docker command has HTTPS_PROXY too."""

    TITLE, COMMAND_USES_PROXY = "docker buildx build FROM, command with HTTPS_PROXY", True
    FETCHES_TOKENS_BY_ITSELF = False


class HalfProxiedBuildxClient(BuildxClient):
    """HTTPS_PROXY is set for the docker command, but not for the BuildKit in dockerd."""

    TITLE, CAN_PUSH, COMMAND_USES_PROXY = "docker buildx build FROM, only the command with HTTPS_PROXY", False, True
    ENGINE_GOES_DIRECTLY = True


class MirroredBuildxClient(BuildxClient):
    """The BuildKit in dockerd with dockerd's registry-mirrors."""

    TITLE, CAN_PUSH, MIRRORED_HOSTS = "docker buildx build FROM, registry-mirrors", False, ("docker.io",)


class CommandClient(MatrixClient):
    """A client that is a command: it has the environment of an engine, and a docker `config.json`."""

    def run(self, logins: Logins, *argv: str) -> Result:
        environment = {"DOCKER_CONFIG": str(self.write_logins(logins).parent), "HOME": str(self.folder)}
        return run(self.machine.command(argv), clean_environment({**self.network.engine, **environment}))

    def forget(self) -> None:
        shutil.rmtree(self.last_folder, ignore_errors=True)


class ImagetoolsClient(CommandClient):
    """docker buildx imagetools, which reads and writes manifests without a daemon."""

    TITLE, PACKAGE = "docker buildx imagetools", "docker-buildx"

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.run(logins, "docker", "buildx", "imagetools", "inspect", reference)

    def push(self, source: str, target: str, logins: Logins) -> Result:
        return self.run(logins, "docker", "buildx", "imagetools", "create", "--tag", target, source)


class ManifestClient(CommandClient):
    """docker manifest inspect, which asks the registry without a daemon."""

    TITLE, PACKAGE, CAN_PUSH = "docker manifest inspect", "docker-cli", False

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.run(logins, "docker", "manifest", "inspect", reference)


class OrasClient(CommandClient):
    """oras cp, which copies all platforms."""

    TITLE, PACKAGE = "oras cp", "oras"

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.run(logins, "oras", "cp", "--to-oci-layout", reference, f"{self.new_folder()}:1")

    def push(self, source: str, target: str, logins: Logins) -> Result:
        return self.run(logins, "oras", "cp", "--from-oci-layout", f"{self.last_folder}:1", target)


class CosignClient(CommandClient):
    """cosign save and load, which use go-containerregistry, as kaniko and ko do."""

    TITLE, PACKAGE = "cosign save", "cosign"

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.run(logins, "cosign", "save", "--dir", str(self.new_folder()), reference)

    def push(self, source: str, target: str, logins: Logins) -> Result:
        return self.run(logins, "cosign", "load", "--dir", str(self.last_folder), target)


class CraneClient(CommandClient):
    """crane pull and push."""

    TITLE, PACKAGE, MISSING_IN = "crane pull", "crane", ("trixie",)

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.run(logins, "crane", "pull", "--format=oci", reference, str(self.new_folder()))

    def push(self, source: str, target: str, logins: Logins) -> Result:
        return self.run(logins, "crane", "push", "--index", str(self.last_folder), target)


class ContainerdClient(MatrixClient):
    """containerd, by ctr."""

    TITLE, PACKAGE = "ctr images pull", "containerd"
    USES_CRI: ClassVar[bool] = False
    MIRROR_PATH: ClassVar[str] = ""

    def start(self) -> None:
        super().start()
        self.containerd = Containerd(self.folder / "c", self.network.engine, self.machine, cri=self.USES_CRI)
        for host in self.MIRRORED_HOSTS if self.uses_mirror else ():
            self.containerd.configure_mirror(host, f"http://{self.network.mirror}{self.MIRROR_PATH}")
        self.containerd.start()

    def stop(self) -> None:
        self.containerd.stop()
        super().stop()

    def pull(self, reference: str, logins: Logins) -> Result:
        return self.containerd.try_pull(reference, *self._login_options(reference, logins))

    def forget(self) -> None:
        self.containerd.remove_all_images()

    def push(self, source: str, target: str, logins: Logins) -> Result:
        return self.containerd.try_push(target, source, *self._login_options(target, logins))

    @staticmethod
    def _login_options(reference: str, logins: Logins) -> list[str]:
        login = logins.get(reference.partition("/")[0])
        return ["--user", ":".join(login)] if login else []


class MirroredContainerdClient(ContainerdClient):
    """containerd with the hosts.toml of the README, which kind, k3s and RKE2 write too."""

    TITLE, CAN_PUSH, MIRRORED_HOSTS = "ctr images pull, hosts.toml", False, _WITHOUT_LOGIN


class CRIClient(ContainerdClient):
    """containerd, asked by the Container Runtime Interface, as crictl and the kubelet (imagePullSecrets) do."""

    TITLE, CAN_PUSH, USES_CRI = "PullImage of the CRI", False, True

    def start(self) -> None:
        super().start()
        script = Path(__file__).with_name("cri_pull.py")
        self._script = shutil.copy(script, self.folder / script.name)

    def pull(self, reference: str, logins: Logins) -> Result:
        login = logins.get(reference.partition("/")[0], ())
        argv = ["python3", self._script, str(self.containerd.address), reference, *login]
        return run(self.machine.command(argv), clean_environment({}))

    def forget(self) -> None:
        self.containerd.remove_all_images(namespace="k8s.io")


class MirroredCRIClient(CRIClient):
    """The same with hosts.toml, in which the URL of the mirror ends as k3s and RKE2 write it."""

    TITLE, MIRRORED_HOSTS, MIRROR_PATH = "PullImage of the CRI, hosts.toml", _WITHOUT_LOGIN, "/v2"


def write_build_context(folder: Path, reference: str) -> str:
    """Write a Dockerfile that builds on the image `reference`, and return its folder."""
    context = folder / "context"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(f"FROM {reference}\nLABEL built=here\n")
    return str(context)


@frozen
class AbsentClient:
    """A client that the machine cannot have, and the reason."""

    title: str
    reason: str


CLIENTS: tuple[type[MatrixClient], ...] = (
    SkopeoClient,
    PodmanClient,
    PodmanBuildClient,
    BuildahClient,
    DockerClient,
    DockerContainerdClient,
    ClassicBuildClient,
    BuildxClient,
    BuildxContainerdClient,
    ProxiedBuildxClient,
    HalfProxiedBuildxClient,
    ImagetoolsClient,
    ManifestClient,
    ContainerdClient,
    CRIClient,
    OrasClient,
    CosignClient,
    CraneClient,
    MirroredPodmanClient,
    MirroredBuildahClient,
    MirroredDockerClient,
    MirroredBuildxClient,
    MirroredContainerdClient,
    MirroredCRIClient,
)

ABSENT_CLIENTS = (
    AbsentClient("crictl", "Debian has no package of it. Its request, PullImage of the CRI, is in the table."),
    AbsentClient(
        "regctl", "Debian has no package of it. Like `ctr` and `oras` it asks for the manifest without a ping."
    ),
    AbsentClient(
        "buildkitd (the drivers docker-container and kubernetes)",
        "Debian has no package of it, and its image cannot be had. The BuildKit in dockerd has the same resolver.",
    ),
    AbsentClient(
        "CRI-O", "Debian has no package of it. It reads the same `registries.conf` as podman, by the same library."
    ),
    AbsentClient("k3s, RKE2", "Debian has no packages of them. They write the same `hosts.toml` for their containerd."),
    AbsentClient("kind", "The image of its nodes cannot be had. Their containerd reads the same `hosts.toml`."),
    AbsentClient(
        "kaniko, ko", "Debian has no packages of them. They use go-containerregistry, as crane and cosign do."
    ),
)

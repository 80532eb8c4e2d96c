"""How to set up each engine, with the address that the visitor came by. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from dockerproxy.oci.names import Host


@frozen
class Step:
    """Something to do, and the commands or files for it."""

    text: str
    commands: tuple[str, ...]


@frozen
class Engine:
    """An engine: its steps, the last of which undoes the others."""

    id: str
    name: str
    steps: tuple[Step, ...]
    note: str


_LOCAL_NAME = (
    "Hosts without multicast DNS (Alpine, programs that are linked statically) and containers need an address, or a "
    "name of your DNS, in place of a name that ends in .local: open this page by it."
)


def engines(server: Host, proxy: Host, registries: Sequence[str]) -> tuple[Engine, ...]:
    """Return the engines. `server` is the address of the set-up script, and `proxy` that of the proxy, without TLS.

    `registries` are the names of the cached registries.
    """
    url = f"http://{server.authority.removesuffix(':80')}"
    authority = proxy.authority
    script = f"curl -fsS {url}/setup | sudo sh"
    check = Step("Is everything right?", (f"{script} -s -- --check",))
    undo = Step("Undo all of it:", (f"{script} -s -- --remove",))

    def by_script(id_: str, name: str, text: str, command: str) -> Engine:
        return Engine(id_, name, (Step(text, (script,)), Step("Try it:", (command,)), check, undo), _LOCAL_NAME)

    directory = "/etc/containerd/certs.d"
    write_hosts = "\n".join(
        f"mkdir -p {directory}/{name} && printf '%s\\n' 'server = \"https://{name}\"' '' "
        f'\'[host."http://{authority}"]\' \'  capabilities = ["pull", "resolve"]\' > {directory}/{name}/hosts.toml'
        for name in registries
    )
    remove_hosts = "rm -r " + " ".join(f"{directory}/{name}" for name in registries)
    mirrors = "mirrors:\n" + "\n".join(f'  {name}:\n    endpoint: ["http://{authority}"]' for name in registries)
    buildkit = "\n".join(f'[registry."{name}"]\n  mirrors = ["{authority}"]' for name in registries)
    kind = (
        "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\ncontainerdConfigPatches:\n  - |-\n"
        '    [plugins."io.containerd.grpc.v1.cri".registry]\n      config_path = "/etc/containerd/certs.d"\n'
        "nodes:\n  - role: control-plane\n    extraMounts:\n"
        f"      - hostPath: {directory}\n        containerPath: {directory}"
    )
    hosts_step = Step("As root, one file for each registry. containerd reads them at the next pull:", (write_hosts,))
    return (
        by_script(
            "docker",
            "Docker",
            "On each Docker host, as root. The script trusts the proxy's CA, points dockerd here, and says what "
            "it changed. Run it again at any time. It restarts dockerd if something changed.",
            "docker pull alpine",
        ),
        by_script(
            "containerd",
            "containerd",
            "On each host, as root. The script trusts the proxy's CA, points containerd here and restarts it if "
            "something changed. nerdctl and ctr reach registries by themselves: they need HTTPS_PROXY in the "
            "environment.",
            f"sudo env HTTPS_PROXY=http://{authority}/ ctr images pull docker.io/library/alpine:latest",
        ),
        by_script(
            "podman",
            "Podman",
            "On each host, as root. The script trusts the proxy's CA and points podman and buildah here, for "
            "all users.",
            "podman pull docker.io/library/alpine",
        ),
        by_script(
            "crio",
            "CRI-O",
            "On each host, as root. The script trusts the proxy's CA, points CRI-O at this address and restarts it if "
            "something changed.",
            "sudo crictl pull docker.io/library/alpine",
        ),
        Engine(
            "k3s",
            "k3s",
            (
                Step(
                    "Write this into /etc/rancher/k3s/registries.yaml (RKE2: /etc/rancher/rke2/registries.yaml):",
                    (mirrors,),
                ),
                Step("Then restart it:", ("sudo systemctl restart k3s   # or k3s-agent, rke2-server, rke2-agent",)),
                Step("Try it:", ("sudo k3s crictl pull docker.io/library/alpine",)),
                Step("Undo it: remove these lines, and restart it.", ()),
            ),
            _LOCAL_NAME,
        ),
        Engine(
            "kind",
            "kind",
            (
                hosts_step,
                Step("Give them to the nodes of a cluster, in the file of kind create cluster --config FILE:", (kind,)),
                Step("Undo it: create the cluster without these lines, and remove the files.", (remove_hosts,)),
            ),
            _LOCAL_NAME,
        ),
        Engine(
            "buildkit",
            "BuildKit",
            (
                Step(
                    "docker build pulls through dockerd and needs nothing. A BuildKit of its own reads buildkitd.toml:",
                    (f'{buildkit}\n[registry."{authority}"]\n  http = true',),
                ),
                Step(
                    "Create it:",
                    ("docker buildx create --use --driver docker-container --buildkitd-config buildkitd.toml",),
                ),
                Step("Undo it:", ("docker buildx rm",)),
            ),
            _LOCAL_NAME,
        ),
        Engine(
            "kubernetes",
            "Kubernetes",
            (
                Step("On each node, as root: the script sets up its containerd, CRI-O or dockerd.", (script,)),
                Step("Or, for containerd without the CA, as root, one file for each registry:", (write_hosts,)),
                check,
                Step("Undo it:", (f"{script} -s -- --remove", remove_hosts)),
            ),
            _LOCAL_NAME,
        ),
    )

"""The manifests in examples/kubernetes have the schemas of Kubernetes, and fit together and to the settings."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dockerproxy import parsers
from dockerproxy.daemon.listener_service import SHUTDOWN_GRACE

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")

FOLDER = Path(__file__).parents[1] / "examples/kubernetes"
MANIFESTS = [
    (f"{path.stem}, {manifest['kind']} {manifest['metadata']['name']}", manifest)
    for path in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]


def find(kind: str, name: str) -> Any:
    [manifest] = [one for _, one in MANIFESTS if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return manifest


@pytest.mark.parametrize("manifest", [one for _, one in MANIFESTS], ids=[name for name, _ in MANIFESTS])
def test_manifests_have_their_schemas(manifest: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(manifest, validator.latest_version(), strict=True)


def test_a_wrong_field_is_found() -> None:
    """The check above finds it."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    manifest = yaml.safe_load(yaml.safe_dump(find("StatefulSet", "docker-registry-proxy")))
    manifest["spec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(Exception, match="enviroment"):
        validator.validate(manifest, validator.latest_version(), strict=True)


def test_the_members_find_each_other() -> None:
    stateful_set = find("StatefulSet", "docker-registry-proxy")["spec"]
    members = find("Service", stateful_set["serviceName"])["spec"]
    assert members["clusterIP"] == "None" and members["publishNotReadyAddresses"] is True
    labels = stateful_set["template"]["metadata"]["labels"]
    assert stateful_set["selector"]["matchLabels"] == members["selector"] == labels
    assert find("Service", "docker-registry-proxy")["spec"]["selector"] == labels
    assert find("PodDisruptionBudget", "docker-registry-proxy")["spec"]["selector"]["matchLabels"] == labels
    settings = find("ConfigMap", "docker-registry-proxy")["data"]
    [fleet] = parsers.fleet(settings["FLEET"])
    assert fleet.name == f"{stateful_set['serviceName']}.default.svc.cluster.local"
    [container] = stateful_set["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"proxy": 3128, "registry": 5443}
    assert [port["targetPort"] for port in members["ports"]] == ["proxy"]


def test_clients_pull_and_push_by_one_name() -> None:
    """Pods push to the name of the Service. Nodes pull by it through `hosts.toml`, which passes it on as `ns`."""
    service = find("Service", "docker-registry-proxy")
    settings = find("ConfigMap", "docker-registry-proxy")["data"]
    assert settings["REGISTRY_HOSTNAME"] == f"{service['metadata']['name']}.default.svc"
    ports = {port["targetPort"]: (port["port"], port.get("nodePort")) for port in service["spec"]["ports"]}
    assert ports == {"proxy": (3128, 30128), "registry": (443, None)}
    assert settings["REGISTRY_HOSTNAME"] in (FOLDER.parents[1] / "docs/fleet.md").read_text()


def test_the_settings_exist_and_their_files_are_mounted() -> None:
    settings = find("ConfigMap", "docker-registry-proxy")["data"]
    documented = (FOLDER.parents[1] / "docs/settings.md").read_text()
    assert [name for name in settings if f"`{name}`" not in documented] == []
    pod = find("StatefulSet", "docker-registry-proxy")["spec"]
    [container] = pod["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"] for volume in pod["template"]["spec"]["volumes"]}
    claims = {claim["metadata"]["name"] for claim in pod["volumeClaimTemplates"]}
    assert {mount["name"] for mount in mounts.values()} == volumes | claims
    assert settings["STATE_DIR"] in mounts and mounts["/ca"]["readOnly"] is True
    for name in ("CA_CRT_FILE", "CA_KEY_FILE"):
        assert settings[name] in ("/ca/tls.crt", "/ca/tls.key")  # the keys of a Secret of `kubectl create secret tls`
    [claim] = pod["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "100Gi"
    assert parsers.size(settings["CACHE_MAX_SIZE"]) < 100 << 30


def test_a_pod_has_the_time_to_end_its_transfers() -> None:
    pod = find("StatefulSet", "docker-registry-proxy")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep" and pod["terminationGracePeriodSeconds"] > int(seconds) + SHUTDOWN_GRACE + 10
    probes = [container[name]["httpGet"] for name in ("readinessProbe", "livenessProbe")]
    assert probes == [{"path": path, "port": "proxy"} for path in ("/readyz", "/healthz")]


def test_no_container_has_more_rights_than_it_needs() -> None:
    for kind, name in (("StatefulSet", "docker-registry-proxy"), ("DaemonSet", "docker-registry-proxy-containerd")):
        pod = find(kind, name)["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            rights = container["securityContext"]
            assert (rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (False, True)
            assert rights["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize(("address", "host"), [("192.0.2.7", "192.0.2.7"), ("2001:db8::7", "[2001:db8::7]")])
def test_the_daemon_set_writes_hosts_toml(tmp_path: Path, address: str, host: str) -> None:
    """The script is run as in the pod."""
    shell = shutil.which("sh")
    assert shell is not None
    pod = find("DaemonSet", "docker-registry-proxy-containerd")["spec"]["template"]["spec"]
    [container] = pod["initContainers"]
    *_, script = container["command"]
    environment = {"PATH": os.environ["PATH"], "NODE": address}
    script = script.replace("/certs.d", str(tmp_path))
    for _ in range(2):  # also if the file is there
        subprocess.run([shell, "-euc", script], check=True, env=environment)
    hosts = tomllib.loads((tmp_path / "_default/hosts.toml").read_text())
    [port] = [one for one in find("Service", "docker-registry-proxy")["spec"]["ports"] if one["targetPort"] == "proxy"]
    assert hosts == {"host": {f"http://{host}:{port['nodePort']}": {"capabilities": ["pull", "resolve"]}}}
    assert [file.name for file in (tmp_path / "_default").iterdir()] == ["hosts.toml"]

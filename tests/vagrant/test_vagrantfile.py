"""The Vagrantfile and its scripts, tested without a machine. `make test-vagrant` starts one.

Vagrant checks a provider's settings only if the provider is installed. Stub programs take the place of VirtualBox and
Docker, and libvirt's test driver takes the place of a hypervisor, so that no libvirtd has to run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # runs vagrant

PROJECT = Path(__file__).parents[2]
STUB_PROGRAMS = {
    "VBoxManage": 'case "$1" in --version) echo 7.0.20r163906 ;; esac',
    "docker": "",
    # vagrant-libvirt lists the host's interfaces with it, and ignores the loopback interface.
    "ip": r"""printf '[{"ifname":"eth0"},{"ifname":"office0"}'
        for name in $(ls /sys/class/net); do printf ',{"ifname":"%s"}' "$name"; done; echo ']'""",
}
ROUTE_TABLE = """\
Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
tun0\t00000000\t0100000A\t0003\t0\t0\t50\t00000080\t0\t0\t0
wifi0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
office0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
office0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""
PACKAGE = "docker-registry-proxy_1.0_all.deb"

needs_vagrant = pytest.mark.skipif(shutil.which("vagrant") is None, reason="vagrant is not installed")
needs_shellcheck = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")


class VagrantCheckout:
    """A copy of the project's files that Vagrant reads."""

    def __init__(self, path: Path) -> None:
        self.path = path / "checkout"
        self.stub_folder = path / "tools"
        self.home = path / "home"
        for folder in (self.path / "dist", self.path / "debian", self.stub_folder, self.home):
            folder.mkdir(parents=True)
        shutil.copy(PROJECT / "Vagrantfile", self.path)
        shutil.copytree(PROJECT / "vagrant", self.path / "vagrant")
        (self.path / "debian/rules").touch()
        for name, body in STUB_PROGRAMS.items():
            (self.stub_folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (self.stub_folder / name).chmod(0o755)

    def vagrant(self, *arguments: str, provider: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run vagrant in the checkout."""
        environment = {
            "PATH": f"{self.stub_folder}:/usr/local/bin:/usr/bin:/bin", "HOME": str(self.home), "LC_ALL": "C.UTF-8",
            "VAGRANT_HOME": f"{self.home}/.vagrant.d", "VAGRANT_CHECKPOINT_DISABLE": "1",
            "VAGRANT_DEFAULT_PROVIDER": provider, "LIBVIRT_DEFAULT_URI": "test:///default",
        }  # fmt: skip
        settings = {f"DOCKER_REGISTRY_{name}": value for name, value in settings.items()}
        return subprocess.run(
            ["vagrant", *arguments], cwd=self.path, env=environment | settings, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def require_libvirt(self) -> None:
        """Skip the test if vagrant-libvirt is not installed."""
        if "vagrant-libvirt" not in self.vagrant("plugin", "list", provider="docker").stdout:
            pytest.skip("vagrant-libvirt is not installed")

    def replace_in_vagrantfile(self, old: str, new: str) -> None:
        """Replace `old`, which must occur, by `new` in the Vagrantfile."""
        file = self.path / "Vagrantfile"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def checkout(tmp_path: Path) -> VagrantCheckout:
    return VagrantCheckout(tmp_path)


@needs_vagrant
@pytest.mark.parametrize("provider", ["virtualbox", "libvirt", "docker"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"BOX": "", "BRIDGE": "", "ADDRESS": "", "SHARE": ""},
        {"BOX": "local/debian", "BRIDGE": "office0", "ADDRESS": "10.77.0.10", "SHARE": "9p"},
    ],
    ids=["none", "empty", "all"],
)
def test_every_providers_section_is_valid(checkout: VagrantCheckout, provider: str, settings: dict[str, str]) -> None:
    if provider == "libvirt":
        checkout.require_libvirt()
    result = checkout.vagrant("validate", provider=provider, **settings)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "Vagrantfile validated successfully.\n")


@needs_vagrant
def test_invalid_setting_is_reported(checkout: VagrantCheckout) -> None:
    checkout.replace_in_vagrantfile("docker.has_ssh", "docker.has_shh")
    result = checkout.vagrant("validate", provider="docker")
    assert result.returncode == 1
    assert "The following settings shouldn't exist: has_shh" in result.stderr


@needs_vagrant
def test_missing_host_interface_is_reported(checkout: VagrantCheckout) -> None:
    checkout.require_libvirt()
    result = checkout.vagrant("validate", provider="libvirt", BRIDGE="office1")
    assert result.returncode == 1
    assert "public_network referencing host device 'office1' which does not exist" in result.stderr


@needs_vagrant
@pytest.mark.parametrize(
    ("provider", "network"),
    [
        ("virtualbox", [["bridge", "office0"]]),
        ("libvirt", [["trust_guest_rx_filters", True], ["dev", "office0"]]),
    ],
)
def test_bridge_uses_the_default_route_interface(
    checkout: VagrantCheckout, provider: str, network: list[list[object]]
) -> None:
    if provider == "libvirt":
        checkout.require_libvirt()
    routes = checkout.home / "routes"
    routes.write_text(ROUTE_TABLE)
    checkout.replace_in_vagrantfile("/proc/net/route", str(routes))
    checkout.replace_in_vagrantfile(
        'override.vm.network "public_network"', 'puts lan.to_a.to_json; override.vm.network "public_network"'
    )
    *networks, _ = checkout.vagrant("validate", provider=provider).stdout.splitlines()
    assert network in [json.loads(line) for line in networks]


@needs_vagrant
def test_missing_package_is_reported(checkout: VagrantCheckout) -> None:
    (checkout.path / "debian/rules").unlink()
    for command in ("up", "provision"):
        result = checkout.vagrant(command, provider="docker")
        assert result.returncode == 1
        assert result.stderr == (
            "There is neither dist/docker-registry-proxy_*.deb nor debian/ to build it: put the package into dist/.\n"
        )
    assert checkout.vagrant("destroy", "--force", provider="docker").returncode == 0


@needs_vagrant
def test_newest_package_is_used(checkout: VagrantCheckout) -> None:
    checkout.replace_in_vagrantfile('setting["BOX"]', "(p package; nil)")
    assert "nil\n" in checkout.vagrant("validate", provider="docker").stdout
    for age, name in enumerate([PACKAGE, PACKAGE.replace("1.0", "0.9"), "docker-registry-proxy_2.0.dsc", "x.deb"]):
        (checkout.path / "dist" / name).touch()
        os.utime(checkout.path / "dist" / name, (1e9 - age, 1e9 - age))
    assert f'/dist/{PACKAGE}"\n' in checkout.vagrant("validate", provider="docker").stdout


SCRIPTS = ["vagrant/provision.sh", "tests/vagrant/run", "tests/vagrant/make-box", "tests/vagrant/shares"]


@needs_shellcheck
@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_passes(script: str) -> None:
    result = subprocess.run(
        ["shellcheck", "--external-sources", script], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


def test_provision_script_is_posix_sh() -> None:
    """Debian's sh is dash."""
    shell = shutil.which("dash") or "sh"
    subprocess.run([shell, "-n", PROJECT / "vagrant/provision.sh"], check=True)

"""Tests for the addresses of this machine: the kernel is asked, in a network namespace with known addresses."""

from __future__ import annotations

import os
import subprocess
import sys
from ipaddress import ip_address

import pytest

from dockerproxy.errors import DestinationForbidden
from dockerproxy.net.own_addresses import is_own_address

SETUP = """
set -e
ip link set lo up
ip link add lan type veth peer name other
ip addr add 10.9.8.7/24 dev lan
ip addr add 10.9.8.9/24 dev lan  # a secondary address: its preferred source is the first one
ip -6 addr add 2001:db8::7/64 dev lan nodad
ip link set lan up; ip link set other up
ip link add bridge0 type bridge; ip addr add 172.17.0.1/16 dev bridge0; ip link set bridge0 up
ip route add local 198.51.100.0/24 dev lo
ip -6 route add local 2001:db8:1::/64 dev lo
echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind
exec "$@"
"""
OWN = """127.0.0.1 127.8.8.8 ::1 10.9.8.7 10.9.8.9 172.17.0.1 2001:db8::7 198.51.100.77 2001:db8:1::77
    10.9.8.255 ff02::1 0.0.0.0"""
OTHERS = "10.9.8.8 172.17.0.2 2001:db8::8 198.51.101.1 192.0.2.1 2001:db8:2::1"
SCRIPT = """
import sys
from ipaddress import ip_address
from dockerproxy.net.own_addresses import is_own_address
print(*(address for address in sys.argv[1:] if is_own_address(ip_address(address))))
"""


def can_make_network() -> bool:
    command = ["unshare", "-n", "sh", "-c", SETUP, "sh", "true"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_make_network(), reason="needs root and a network namespace with its own settings")
def test_the_kernels_routes_decide() -> None:
    """Secondary addresses, bridges, and networks that are routed to this machine; whatever `ip_nonlocal_bind` says."""
    own, others = OWN.split(), OTHERS.split()
    command = ["unshare", "-n", "sh", "-c", SETUP, "sh", sys.executable, "-c", SCRIPT, *own, *others]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split() == own


def test_loopback_is_our_own() -> None:
    assert is_own_address(ip_address("127.0.0.1"))


def test_a_kernel_that_cannot_be_asked_forbids_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr("socket.socket", refuse)
    with pytest.raises(DestinationForbidden, match=r"192\.0\.2\.1 is an address of this machine.*AF_NETLINK"):
        is_own_address(ip_address("192.0.2.1"))

"""Facts about this machine: ports, addresses, disks, files and the CA. All functions block."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from dockerproxy.daemon.listener_service import OpenPort
from dockerproxy.doctor.checks import DiskFacts, MemberFacts, NameConstraints, PortFacts
from dockerproxy.errors import DestinationForbidden
from dockerproxy.net.own_addresses import is_own_address
from dockerproxy.oci.names import Host
from dockerproxy.proxy.issuer import get_extension, is_readable_by_others

_CONNECT_TIMEOUT = 3.0  # seconds
_MEMBER_PORT = 3128  # of a member of FLEET that is given without one
_MAX_CERTIFICATE = 64 * 1024  # bytes

# Documentation networks (RFC 5737, RFC 3849): a route to them is that to the Internet, and no packet is sent.
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def port_facts(port: OpenPort) -> PortFacts:
    """Return whether `port` answers at an address of this machine that is not loopback."""
    address = ipaddress.ip_address(port.host.partition("%")[0] or "0.0.0.0")
    if address.is_loopback:
        return PortFacts(port.setting, port.host, port.number, is_loopback=True)
    outside = port.host if not address.is_unspecified else outside_address()
    error = _try_port(outside, port) if outside else ""
    return PortFacts(port.setting, port.host, port.number, is_loopback=False, outside=outside, error=error)


def outside_address() -> str:
    """Return an address by which others may reach this machine, or `""`."""
    for family, elsewhere in _ELSEWHERE.items():
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((elsewhere, 9))
            address = str(sock.getsockname()[0])
            if not ipaddress.ip_address(address).is_loopback:
                return address
    return ""


def _try_port(address: str, port: OpenPort) -> str:
    """Return why the port does not answer at `address`, or `""`. One with TLS has to accept connections only."""
    try:
        with socket.create_connection((address, port.number), _CONNECT_TIMEOUT) as sock:
            if not port.secure:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                if not sock.recv(16).startswith(b"HTTP/1."):
                    return "another program answers"
    except TimeoutError:
        return f"no answer within {_CONNECT_TIMEOUT:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def member_facts(name: str, fingerprint: str) -> MemberFacts:
    """Return whether a member of the fleet answers, and whether the SHA-256 of its CA is `fingerprint`."""
    address = Host.parse(name, _MEMBER_PORT)
    connection = HTTPConnection(address.name, address.port, timeout=_CONNECT_TIMEOUT)
    try:
        connection.request("GET", "/ca.crt")
        response = connection.getresponse()
        content = response.read(_MAX_CERTIFICATE)
    except TimeoutError:
        return MemberFacts(name, f"no answer within {_CONNECT_TIMEOUT:g} s")
    except OSError as error:
        return MemberFacts(name, error.strerror or str(error))
    except HTTPException:
        return MemberFacts(name, "another program answers")
    finally:
        connection.close()
    if response.status != 200:
        return MemberFacts(name, f"it refuses /ca.crt (status {response.status})")
    try:
        certificate = x509.load_pem_x509_certificate(content)
    except ValueError:
        return MemberFacts(name, "another program answers")
    found = certificate.fingerprint(hashes.SHA256()).hex(":").upper()
    return MemberFacts(name, has_same_ca=found == fingerprint)


def used_hosts(repositories: str) -> list[str]:
    """Return the hosts of registries in the directory with the repositories of the cache, the last used first."""
    times: dict[str, float] = {}
    with suppress(OSError), os.scandir(repositories) as entries:
        for entry in entries:
            with suppress(OSError):  # it was removed
                times[entry.name] = entry.stat().st_mtime
    return sorted(times, key=lambda name: (-times[name], name))


def disk_facts(setting: str, directory: str | None, problem: str, growth: int) -> DiskFacts:
    """Return the room in `directory`, unless there is a `problem` with it already. A bucket is no directory."""
    if problem or directory is None:
        return DiskFacts(setting, problem)
    try:
        status = os.statvfs(directory)
    except OSError as error:
        return DiskFacts(setting, f"{setting} cannot be read: {error.strerror}")
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    return DiskFacts(setting, "", free, size, status.f_favail, status.f_files, growth)


def are_own(addresses: Iterable[str]) -> list[bool]:
    """Return of each address whether it is this machine's."""
    results = []
    for address in addresses:
        try:
            results.append(is_own_address(ipaddress.ip_address(address.partition("%")[0])))
        except (ValueError, DestinationForbidden):
            results.append(False)
    return results


def open_descriptors(process_ids: Iterable[int]) -> tuple[list[int], int]:
    """Return how many files each process has open, and the limit of one."""
    used = []
    for process_id in process_ids:
        with suppress(OSError):  # it has ended
            used.append(len(os.listdir(f"/proc/{process_id}/fd")))
    return used, resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def readable_key(path: Path) -> str:
    """Return `path` if other users can read the key there, else `""`."""
    with suppress(OSError):
        return str(path) if is_readable_by_others(path) else ""
    return ""


def name_constraints(certificates: Sequence[x509.Certificate]) -> list[NameConstraints]:
    """Return the name constraints of the certificates that have any."""
    found = (get_extension(certificate, x509.NameConstraints) for certificate in certificates)
    return [_constraints(extension) for extension in found if extension is not None]


def _constraints(extension: x509.NameConstraints) -> NameConstraints:
    permitted, excluded = extension.permitted_subtrees or [], extension.excluded_subtrees or []
    permitted_names, permitted_networks = _names(permitted), _networks(permitted)
    return NameConstraints(permitted_names or None, _names(excluded), permitted_networks or None, _networks(excluded))


def _names(subtrees: Iterable[x509.GeneralName]) -> tuple[str, ...]:
    return tuple(subtree.value for subtree in subtrees if isinstance(subtree, x509.DNSName))


def _networks(subtrees: Iterable[x509.GeneralName]) -> tuple[str, ...]:
    return tuple(str(subtree.value) for subtree in subtrees if isinstance(subtree, x509.IPAddress))

"""The names of this machine and the domains of its network, read from the files in which the system keeps them.

Nothing here asks a name server: that could block, and its answer would be that of whoever controls the network.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from attrs import frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Host

_HOSTS = Path("/etc/hosts")
_RESOLV_CONF = Path("/etc/resolv.conf")
_PUBLIC_SUFFIX_LIST = Path("/usr/share/publicsuffix/public_suffix_list.dat")
"""Mozilla's list of the domains below which anybody can register a name. Debian's package is publicsuffix."""

_MAX_FILE = 1024 * 1024  # bytes that are read of one file

# Domains below which anybody can register a name, for a machine without the list: the second levels of countries, and
# services that give a name to whoever wants one for an address at home or in a data centre.
_SECOND_LEVELS = frozenset("ac co com edu gob gouv gov go gv me mil name ne net nom or org plc priv sch web".split())
_NAME_SERVICES = frozenset(
    """
    amazonaws.com azurewebsites.net cloudapp.net azure.com cloudfront.net ddns.net ddnsfree.com ddnss.de duckdns.org
    dyndns.org dynu.net dynv6.net dyn-o-saur.com freeddns.org gotdns.com hopto.org homeip.net homelinux.org lvh.me
    mooo.com myfritz.net mynetname.net nip.io no-ip.biz no-ip.org ngrok.io ngrok-free.app selfhost.de serveftp.com
    spdns.de sslip.io synology.me sytes.net traefik.me ts.net xip.io zapto.org localtest.me webhop.me
    """.split()
)


@frozen
class LocalNames:
    """`names` are those of this machine, `domains` those of its network. All are lower-case and have no final dot."""

    names: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    @classmethod
    def read(cls) -> LocalNames:
        """Read them. A file that is missing or cannot be read has none. Blocks for small files only."""
        return find_local_names(socket.gethostname(), _read(_HOSTS), _read(_RESOLV_CONF), _lines(_PUBLIC_SUFFIX_LIST))


def find_local_names(hostname: str, hosts: str, resolv_conf: str, public_suffixes: Iterable[str]) -> LocalNames:
    """Return the names by the machine's `hostname` and the contents of the files.

    A domain below which anybody can register a name is left out. Its names are not those of one organisation.
    """
    names = frozenset(filter(None, map(_host_name, (hostname, *_aliases(hostname, hosts)))))
    label = hostname.lower().partition(".")[0]
    candidates = {domain for first, _, domain in (name.partition(".") for name in names) if first == label}
    candidates = {domain for domain in (*candidates, *_search_domains(resolv_conf)) if "." in domain}
    rules = _relevant_rules(candidates, public_suffixes) if candidates else frozenset()
    return LocalNames(names, frozenset(domain for domain in candidates if not _is_public(domain, rules)))


def _aliases(hostname: str, hosts: str) -> Iterator[str]:
    """Yield the names that hosts(5) has beside the machine's own."""
    own = {hostname.lower(), hostname.lower().partition(".")[0]}
    for line in hosts.splitlines():
        _, *names = line.partition("#")[0].lower().split() or [""]
        if own & set(names):
            yield from names


def _search_domains(resolv_conf: str) -> list[str]:
    """Return the search list of resolv.conf(5). The last line of either kind counts."""
    domains: list[str] = []
    for line in resolv_conf.splitlines():
        keyword, *words = line.split() or [""]
        if keyword == "search":
            domains = words
        elif keyword == "domain":
            domains = words[:1]
    return list(filter(None, map(_host_name, domains)))


def _host_name(text: str) -> str:
    """Return `text` as the canonical name of a host, "" if it is none."""
    try:
        host = Host.parse(text)
    except NameInvalid:
        return ""
    return "" if host.is_address or ":" in text else host.name


def _relevant_rules(domains: Iterable[str], public_suffixes: Iterable[str]) -> frozenset[str]:
    """Return the rules of the list that can concern `domains`. Each process keeps only those few of 10,000."""
    wanted = {rule for domain in domains for rule in (domain, f"*.{domain.partition('.')[2]}", f"!{domain}")}
    return frozenset(wanted.intersection(line.strip().lower() for line in public_suffixes))


def _is_public(domain: str, rules: frozenset[str]) -> bool:
    """Whether anybody can register a name below `domain` (https://publicsuffix.org/list/)."""
    if f"!{domain}" in rules:
        return False
    label, _, parent = domain.partition(".")
    is_second_level = label in _SECOND_LEVELS and len(parent) == 2
    return is_second_level or domain in rules or f"*.{parent}" in rules or domain in _NAME_SERVICES


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:
        return


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE).decode("utf-8", "replace")
    except OSError:
        return ""

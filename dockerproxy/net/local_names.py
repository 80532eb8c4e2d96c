"""The names of this machine and the domains of its network, read from the files in which the system keeps them.

Nothing here asks a name server: that could block, and its answer would be that of whoever controls the network.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from attrs import frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.net.public_suffix import domains_of_one_owner, read_list
from dockerproxy.oci.names import Host

_HOSTS = Path("/etc/hosts")
_RESOLV_CONF = Path("/etc/resolv.conf")

_MAX_FILE = 128 * 1024  # bytes that are read of one file; the own names are the first ones


@frozen
class LocalNames:
    """`names` are those of this machine, `domains` those of its network. All are lower-case and have no final dot."""

    names: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    @classmethod
    def read(cls) -> LocalNames:
        """Read them. A file that is missing or cannot be read has none. Blocks for small files only."""
        return find_local_names(socket.gethostname(), _read(_HOSTS), _read(_RESOLV_CONF), read_list())


def find_local_names(hostname: str, hosts: str, resolv_conf: str, public_suffixes: Iterable[str]) -> LocalNames:
    """Return the names by the machine's `hostname` and the contents of the files.

    A domain below which anybody can register a name is left out. Its names are not those of one organisation.
    """
    names = frozenset(filter(None, map(_host_name, (hostname, *_aliases(hostname, hosts)))))
    label = hostname.lower().partition(".")[0]
    own_domains = [domain for first, _, domain in (name.partition(".") for name in names) if first == label]
    domains = frozenset(domain for domain in (*own_domains, *_search_domains(resolv_conf)) if "." in domain)
    return LocalNames(names, domains_of_one_owner(domains, public_suffixes))


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


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_FILE).decode("utf-8", "replace")
    except OSError:
        return ""

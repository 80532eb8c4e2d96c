"""Domains below which anybody can register a name, by Mozilla's Public Suffix List (https://publicsuffix.org/list/).

Names below such a domain, `co.uk` or `duckdns.org`, belong to different owners. Only a list can tell which ones these
are. Debian's package is publicsuffix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, takewhile
from pathlib import Path

LIST_FILE = Path("/usr/share/publicsuffix/public_suffix_list.dat")

# Domains below which anybody can register a name, if the list is missing or older than their entries: the second levels
# of countries, services that give names to addresses at home or in a data centre, and registries with one for each
# customer.
_SECOND_LEVELS = frozenset("ac co com edu gob gouv gov go gv me mil name ne net nom or org plc priv sch web".split())
_NAME_SERVICES = frozenset(
    """
    amazonaws.com azurecr.cn azurecr.io azurecr.us azurewebsites.net cloudapp.net azure.com cloudfront.net ddns.net
    ddnsfree.com ddnss.de duckdns.org dyndns.org dynu.net dynv6.net dyn-o-saur.com freeddns.org gotdns.com hopto.org
    homeip.net homelinux.org jfrog.io lvh.me mooo.com myfritz.net mynetname.net nip.io no-ip.biz no-ip.org ngrok.io
    ngrok-free.app pkg.dev selfhost.de serveftp.com spdns.de sslip.io synology.me sytes.net traefik.me ts.net xip.io
    zapto.org localtest.me webhop.me
    """.split()
)


@lru_cache(256)  # the list is read from the disk for each name, in 2 ms; only hosts with a login are looked up
def registrable_domain(name: str, list_file: Path = LIST_FILE) -> str | None:
    """Return the domain that the owner of `name` registered: `company.co.uk` for `registry.company.co.uk`.

    The names of a company's own network end with it too: `company.lan` for `registry.company.lan`. Return None if
    anybody can register a name below `name` itself, or if there is no list.
    """
    try:
        labels = name.encode("ascii").decode("idna").split(".")  # the list has Unicode
        domains = [".".join(labels[start:]) for start in range(len(labels))]
        with list_file.open(encoding="utf-8", errors="replace") as lines:
            rules = relevant_rules(domains, lines)
    except (OSError, UnicodeError):
        return None
    for index, domain in enumerate(domains):
        if is_public_suffix(domain, rules) or index == len(domains) - 1:
            return domains[index - 1] if index else None
    return None


def has_names_of_everybody(name: str, list_file: Path = LIST_FILE) -> bool:
    """Return whether `name` is a top-level domain, or one such as ``co.uk`` below which everybody registers domains.

    Domains of which one company gives names to its customers (``pkg.dev``, ``azurecr.io``) are none of these.
    """
    label, _, parent = name.partition(".")
    if not parent or (label in _SECOND_LEVELS and len(parent) == 2):
        return True
    try:
        with list_file.open(encoding="utf-8", errors="replace") as lines:
            registered = takewhile(lambda line: "===END ICANN DOMAINS===" not in line, lines)
            rules = relevant_rules([name.encode("ascii").decode("idna")], registered)
    except (OSError, UnicodeError):
        return False
    return bool(rules) and not any(rule.startswith("!") for rule in rules)


def relevant_rules(domains: Iterable[str], lines: Iterable[str]) -> frozenset[str]:
    """Return the rules of the list that can concern `domains`, so that nobody has to keep all 10,000 of them."""
    wanted = {rule for domain in domains for rule in (domain, f"*.{domain.partition('.')[2]}", f"!{domain}")}
    return frozenset(wanted.intersection(line.strip().lower() for line in lines))


def is_public_suffix(domain: str, rules: frozenset[str]) -> bool:
    """Return whether anybody can register a name below `domain`, by its relevant rules of the list."""
    if f"!{domain}" in rules:
        return False
    label, _, parent = domain.partition(".")
    is_second_level = label in _SECOND_LEVELS and len(parent) == 2
    return is_second_level or domain in rules or f"*.{parent}" in rules or domain in _NAME_SERVICES


def domains_of_one_owner(domains: frozenset[str], lines: Iterable[str]) -> frozenset[str]:
    """Return those of `domains` below which nobody else can have a name, by the `lines` of the list.

    Others have names not only below a public suffix, but also below every parent domain of one.
    """
    if not domains:
        return domains
    shared = {domain for domain in domains if is_public_suffix(domain, frozenset())}
    exceptions = set()
    children = tuple(f".{domain}" for domain in domains)
    parents = {domain.partition(".")[2] for domain in domains}
    for line in chain(_NAME_SERVICES, lines):
        rule = line.strip().lower()
        suffix = rule.removeprefix("*.")
        if rule.startswith("!"):
            exceptions.add(rule[1:])
        elif suffix in domains or suffix.endswith(children):
            shared.update(domain for domain in domains if f".{suffix}".endswith(f".{domain}"))
        elif suffix != rule and suffix in parents:
            shared.update(domain for domain in domains if domain.partition(".")[2] == suffix)
    return domains - (shared - exceptions)


def read_list() -> Iterator[str]:
    """Yield the lines of the list; none if it cannot be read."""
    try:
        with LIST_FILE.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:
        return

"""This machine's names and domains, from the contents of files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.net.local_names import LocalNames, find_local_names

SUFFIXES = [
    "// comment",
    "com",
    "uk",
    "co.uk",
    "duckdns.org",
    "*.ck",
    "!www.ck",
    "shared.example.com",
    "*.compute.cloud.example",
]


def find(hostname: str = "vm", hosts: str = "", resolv_conf: str = "") -> LocalNames:
    return find_local_names(hostname, hosts, resolv_conf, SUFFIXES)


def test_names_are_those_of_the_machine_only() -> None:
    hosts = """
127.0.0.1 localhost
127.0.1.1 proxy.corp.example.net proxy cache.corp.example.net  # comment proxy.evil.example
10.0.0.9 other.example.net other
0.0.0.0 ads.example
"""
    found = find("proxy", hosts)
    assert found.names == {"proxy", "proxy.corp.example.net", "cache.corp.example.net"}
    assert found.domains == {"corp.example.net"}
    assert find("Proxy.Corp.Example.net").domains == {"corp.example.net"}


def test_the_domain_is_that_of_the_name_whose_first_label_is_the_hostname() -> None:
    hosts = "127.0.1.1 proxy proxy.corp.example.net registry.example.org"
    assert find("proxy", hosts) == LocalNames(
        frozenset({"proxy", "proxy.corp.example.net", "registry.example.org"}), frozenset({"corp.example.net"})
    )


@pytest.mark.parametrize(
    ("resolv_conf", "domains"),
    [
        ("nameserver 10.0.0.1\nsearch corp.example.net lab.example.net\n", {"corp.example.net", "lab.example.net"}),
        ("domain corp.example.net", {"corp.example.net"}),
        ("search a.example.net\ndomain b.example.net\n", {"b.example.net"}),  # the last one counts
        ("search Corp.Example.NET.", {"corp.example.net"}),
        ("search ns.svc.cluster.local svc.cluster.local", {"ns.svc.cluster.local", "svc.cluster.local"}),
        ("# search corp.example.net", set()),
        ("search", set()),
        ("search .", set()),
        ("search 10.0.0.1 a:80 bad_:name *.x.example -", set()),
    ],
)
def test_search_domains(resolv_conf: str, domains: set[str]) -> None:
    assert find(resolv_conf=resolv_conf).domains == domains


@pytest.mark.parametrize(
    "domain",
    [
        "com", "lan", "co.uk", "duckdns.org", "shared.example.com", "anything.ck",  # by the list
        "region.compute.cloud.example", "compute.cloud.example", "cloud.example", "example.com",  # it is above a suffix
        "com.br", "gov.pl", "nip.io", "myfritz.net", "azure.com",  # without it
    ],
)  # fmt: skip
def test_a_domain_below_which_anybody_registers_names_is_not_ours(domain: str) -> None:
    assert find(resolv_conf=f"search {domain} corp.example.net").domains == {"corp.example.net"}
    assert find(hostname=f"proxy.{domain}").domains == frozenset()


def test_exceptions_of_the_list() -> None:
    assert find(resolv_conf="search www.ck").domains == {"www.ck"}


def test_this_machines_names_can_be_read() -> None:
    assert all(name == name.lower() for name in LocalNames.read().names)


@given(st.text(), st.text(), st.text())
def test_any_content_is_read(hostname: str, hosts: str, resolv_conf: str) -> None:
    found = find_local_names(hostname, f"127.0.0.1 {hostname} {hosts}", f"search {resolv_conf}", SUFFIXES)
    assert not {"", ".", "com", "co.uk"} & found.domains

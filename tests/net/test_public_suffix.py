"""Registrable domains, by a short list with every kind of rule (https://github.com/publicsuffix/list/wiki/Format)."""

from __future__ import annotations

from pathlib import Path

import pytest

from dockerproxy.net.public_suffix import registrable_domain

LIST = """\
// ===BEGIN ICANN DOMAINS===
com
uk
co.uk
// Cook Islands
*.ck
!www.ck
cn
公司.cn

// ===BEGIN PRIVATE DOMAINS===
duckdns.org
org
io
*.compute.example.com
"""


@pytest.fixture
def suffix_list(tmp_path: Path) -> Path:
    file = tmp_path / "list.dat"
    file.write_text(LIST, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("registry.company.com", "company.com"),
        ("a.b.company.com", "company.com"),
        ("company.com", "company.com"),
        ("com", None),
        ("registry.company.co.uk", "company.co.uk"),
        ("co.uk", None),
        ("victim.duckdns.org", "victim.duckdns.org"),
        ("duckdns.org", None),
        ("one.azurecr.io", "one.azurecr.io"),
        ("a.b.ck", "a.b.ck"),
        ("b.ck", None),
        ("a.www.ck", "www.ck"),
        ("www.ck", "www.ck"),
        ("a.b.compute.example.com", "a.b.compute.example.com"),
        ("registry.company.lan", "company.lan"),
        ("company.lan", "company.lan"),
        ("localhost", None),
        ("a.xn--55qx5d.cn", "a.公司.cn"),
        ("xn--55qx5d.cn", None),
        ("xn--a\u00e9.cn", None),
        ("xn--99999999999.cn", None),
    ],
)
def test_registrable_domain(suffix_list: Path, name: str, domain: str | None) -> None:
    assert registrable_domain(name, suffix_list) == domain


def test_without_a_list(tmp_path: Path) -> None:
    assert registrable_domain("registry.company.com", tmp_path / "none") is None


def test_with_a_damaged_list(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00com\n")
    assert registrable_domain("registry.company.com", tmp_path / "binary") == "company.com"
    assert registrable_domain("registry.duckdns.org", tmp_path / "binary") == "registry.duckdns.org"

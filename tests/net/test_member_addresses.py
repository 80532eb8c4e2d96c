"""The addresses in FLEET."""

from __future__ import annotations

import pytest

from dockerproxy import parsers


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0.0.0.0", "FLEET has 0.0.0.0, which stands for all addresses, in place of the address of a machine"),
        ("[::] [fd00::1]", "FLEET has ::, which stands for all addresses"),
        ("10.0.0.1 224.0.0.1", "FLEET has 224.0.0.1, the address of a group"),
        ("255.255.255.255", "the address of a group"),
        ("[ff02::1]", "the address of a group"),
        ("[fe80::1]", "FLEET has fe80::1, a link-local address"),
        ("[fd00::1] 10.0.0.1:80", "FLEET has addresses of IPv4 and IPv6 (10.0.0.1:80 and [fd00::1]:3128)"),
        ("10.0.0.1 127.0.0.1", "FLEET has 127.0.0.1, by which each machine means itself"),
        ("[fd00::1] [::1]", "FLEET has ::1, by which each machine means itself"),
        ("10.0.0.1 [::ffff:10.0.0.1]", "is given twice"),
        ("[::ffff:0.0.0.0]", "which stands for all addresses"),
    ],
)
def test_addresses_that_are_no_fleet(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as raised:
        parsers.fleet(text)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("10.0.0.1", ["10.0.0.1:3128"]),
        ("127.0.0.1:1 127.0.0.2:1", ["127.0.0.1:1", "127.0.0.2:1"]),
        ("169.254.1.1 169.254.1.2", ["169.254.1.1:3128", "169.254.1.2:3128"]),
        ("[FD00:0::1] [fd00::2]:80", ["[fd00::1]:3128", "[fd00::2]:80"]),
        ("[::ffff:10.0.0.1] 10.0.0.2", ["10.0.0.1:3128", "10.0.0.2:3128"]),
        ("Fleet.Example.", ["fleet.example:3128"]),
    ],
)
def test_addresses_that_are_one(text: str, names: list[str]) -> None:
    assert [member.authority for member in parsers.fleet(text)] == names


def test_the_own_address_in_the_form_of_ipv6() -> None:
    assert parsers.fleet_address("[::ffff:10.0.0.1]").authority == "10.0.0.1:3128"

"""Headers: lookup, copies, and the removal of hop-by-hop fields."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.http.headers import HOP_BY_HOP, Headers

FIELDS = Headers([("Accept", "a"), ("X-One", "1"), ("ACCEPT", "b, c"), ("Authorization", "Basic c2VjcmV0")])


def test_lookup_ignores_case() -> None:
    assert FIELDS.get("accept") == "a"
    assert FIELDS.all("accept") == ["a", "b, c"]
    assert FIELDS.joined("accept") == "a, b, c"
    assert "x-one" in FIELDS
    assert (FIELDS.get("none"), FIELDS.all("none"), FIELDS.joined("none"), "none" in FIELDS) == (None, [], None, False)
    assert [name for name, _ in FIELDS] == ["accept", "x-one", "accept", "authorization"]


def test_without_returns_a_copy() -> None:
    assert FIELDS.without("accept", "authorization") == Headers([("x-one", "1")])
    assert FIELDS.without() == FIELDS
    assert FIELDS != Headers()
    assert FIELDS != list(FIELDS)


def test_repr_hides_values() -> None:
    assert "c2VjcmV0" not in repr(FIELDS)
    assert "authorization" in repr(FIELDS)


def test_hop_by_hop_fields_are_dropped() -> None:
    """RFC 9110, section 7.6.1: drop the hop-by-hop fields and those that Connection names."""
    headers = Headers([
        ("Connection", "keep-alive, X-Mine"), ("connection", " Other "), ("X-Mine", "1"), ("Other", "2"),
        ("Keep-Alive", "5"), ("Proxy-Authorization", "Basic x"), ("Transfer-Encoding", "chunked"), ("Upgrade", "h2c"),
        ("Content-Length", "5"), ("X-Yours", "3"),
    ])  # fmt: skip
    assert list(headers.end_to_end()) == [("content-length", "5"), ("x-yours", "3")]


@given(st.lists(st.tuples(st.sampled_from([*sorted(HOP_BY_HOP), "a", "b", "Connection"]), st.sampled_from("abc"))))
def test_end_to_end_keeps_all_other_fields(fields: list[tuple[str, str]]) -> None:
    connection_options = {value for name, value in fields if name.lower() == "connection"}
    remaining = Headers(fields).end_to_end()
    assert all(name not in HOP_BY_HOP and name not in connection_options for name, _ in remaining)
    assert [field for field in fields if field[0] not in HOP_BY_HOP | connection_options | {"Connection"}] == list(
        remaining
    )
    assert remaining.end_to_end() == remaining

"""Responses of token servers: any JSON gives a token that fits in a header field, or ValueError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.tokens import TokenResponse, readable_repositories

NOW = 1_700_000_000.0


def parse(**document: Any) -> TokenResponse:
    return TokenResponse.parse(json.dumps({"token": "t", **document}).encode(), NOW)


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"token": "t"}, ("t",)),
        ({"access_token": "a"}, ("a",)),
        ({"token": "t", "access_token": "t"}, ("t",)),
        ({"token": "t", "access_token": "a"}, ("t", "a")),
        ({"token": "", "access_token": "a"}, ("a",)),
        ({"token": "x" * 16384}, ("x" * 16384,)),
    ],
)
def test_tokens(document: Any, tokens: tuple[str, ...]) -> None:
    response = TokenResponse.parse(json.dumps(document).encode(), NOW)
    assert response.tokens == tokens
    assert tokens[0] not in repr(response) or len(tokens[0]) == 1


@pytest.mark.parametrize(
    "content",
    [
        b'{"token":"first","token":"t"}', b'{"Token":"t"}', b'{"ACCESS_TOKEN":"t"}', b'{"token":"t","note":"\xff"}',
        b'{"token":"first","Token":"t"}',
    ],
)  # fmt: skip
def test_responses_are_read_as_clients_read_them(content: bytes) -> None:
    assert TokenResponse.parse(content, NOW).tokens == ("t",)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b'"token"', b"{}", b'{"token":1}', b'{"token":""}', b'{"token":["t"]}', b'{"token":true}',
        b"\xff", b"[" * 60_000, b'{"token":"\\ud800"}', b'{"token":"a\\nb"}', b'{"token":"a\\r\\nX: y"}',
        b'{"token":"a b"}', b'{"token":"caf\xc3\xa9"}', b'{"token":"\\u0000"}', b'{"token":"t","access_token":"\\n"}',
        b'{"token":"' + b"x" * 16385 + b'"}', b'{"token":"t","expires_in":' + b"9" * 5000 + b"}",
    ],
    ids=range(20),
)  # fmt: skip
def test_unusable_response(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        TokenResponse.parse(content, NOW)


@pytest.mark.parametrize(
    ("payload", "lifetime"),
    [
        ({}, 60),
        ({"expires_in": 300}, 300),
        ({"expires_in": 0}, 60),
        ({"expires_in": -5}, 60),
        ({"expires_in": "300"}, 60),
        ({"expires_in": True}, 60),
        ({"expires_in": 1e308}, 86400),
        ({"expires_in": 10**9}, 86400),
        ({"expires_in": 10**400}, 86400),
        ({"expires_in": -(10**400)}, 60),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:12:20Z"}, 240),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:12:20.123456789Z"}, 240.123456),
        ({"expires_in": 300, "issued_at": "2023-11-14T23:12:20+01:00"}, 240),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:12:20"}, 240),
        ({"expires_in": 300, "issued_at": "2023-11-14T22:20:00Z"}, 300),  # the server's clock is ahead
        ({"expires_in": 300, "issued_at": "2023-11-14T20:00:00Z"}, 300),  # or behind
        ({"expires_in": 300, "issued_at": "yesterday"}, 300),
        ({"expires_in": 300, "issued_at": "0001-01-01T00:00:00+23:59"}, 300),
        ({"expires_in": 300, "issued_at": "9999-12-31T23:59:59-23:59"}, 300),
        ({"expires_in": 300, "issued_at": 17}, 300),
    ],
    ids=range(20),
)
def test_lifetime(payload: dict[str, Any], lifetime: float) -> None:
    assert parse(**payload).lifetime == pytest.approx(lifetime, abs=1e-5)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**50), 10**50) | st.floats() | st.text() | st.datetimes().map(str),
    lambda children: st.lists(children, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from(["token", "access_token", "expires_in", "issued_at", "scope"]), values))
def test_any_document(document: dict[str, Any]) -> None:
    content = json.dumps(document).encode()
    try:
        response = TokenResponse.parse(content, NOW)
    except ValueError:
        return
    assert 0 < response.lifetime <= 86400
    assert all(token.isascii() and token.isprintable() and " " not in token for token in response.tokens)


@given(st.binary())
def test_any_bytes(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        TokenResponse.parse(content, NOW)


@pytest.mark.parametrize(
    ("scopes", "names"),
    [
        ([], set()),
        ([""], set()),
        (["repository:a/b:pull"], {"a/b"}),
        (["repository:a/b:pull,push", "repository:c:*"], {"a/b", "c"}),
        (["repository:a/b:pull repository:c:pull"], {"a/b", "c"}),
        (["repository:a/b:push"], set()),
        (["repository:a/b:pull2"], set()),
        (["repository:a/b"], set()),
        (["registry:catalog:*", "repository(plugin):a:pull", "pull", ":", "::"], set()),
        (["repository:*:pull", "repository:A:pull", "repository:../x:pull", "repository::pull"], set()),
        ([f"repository:r{number}:pull" for number in range(9)], {f"r{number}" for number in range(8)}),
    ],
    ids=range(11),
)
def test_readable_repositories(scopes: list[str], names: set[str]) -> None:
    assert readable_repositories(scopes) == names

"""Basic credentials in Authorization fields."""

from __future__ import annotations

import base64

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dockerproxy.oci.credentials import BasicCredentials, is_empty_login


def basic_field(text: bytes) -> str:
    return "Basic " + base64.b64encode(text).decode()


@pytest.mark.parametrize(
    ("field", "user", "password"),
    [
        (basic_field(b"alice:wonder:land"), "alice", b"wonder:land"),
        ("bAsIc  QWxhZGRpbjpvcGVuIHNlc2FtZQ== ", "Aladdin", b"open sesame"),
        (basic_field("ä:ö".encode()), "ä", "ö".encode()),
        (basic_field(b"alice:").replace("Basic", "bAsIc"), "alice", b""),
        (basic_field(b"alice:\xff\x00"), "alice", b"\xff\x00"),
    ],
)
def test_parse(field: str, user: str, password: bytes) -> None:
    credentials = BasicCredentials.parse(field)
    assert credentials is not None
    assert (credentials.user, credentials.password_bytes) == (user, password)


def test_the_values_of_rfc_7617() -> None:
    assert BasicCredentials("Aladdin", "open sesame").authorization == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="  # section 2
    assert BasicCredentials("test", "123\u00a3").authorization == "Basic dGVzdDoxMjPCow=="  # section 2.1


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=":")), st.binary())
@example("_json_key", b'{\n  "a": "b:c"\n}')  # Google's registry: the password contains line ends
@example("", b"")
def test_round_trip(user: str, password: bytes) -> None:
    credentials = BasicCredentials(user, password.decode("utf-8", "surrogateescape"))
    assert BasicCredentials.parse(credentials.authorization) == credentials
    assert credentials.password_bytes == password


@pytest.mark.parametrize(
    "field",
    [
        "", "YTpi", "Basic", "Basic !", "Basic é", "Basic YTp", "Basic YTpi!", "Basic YT pi", "Basic\tYTpi", "Bearer x",
        "Basic " + base64.b64encode(b"nocolon").decode(), basic_field(b"\xff:x"), basic_field(b"a:" + b"x" * 5000),
    ],
)  # fmt: skip
def test_invalid_fields(field: str) -> None:
    assert BasicCredentials.parse(field) is None


def test_a_user_with_a_colon_cannot_be_sent() -> None:
    with pytest.raises(ValueError, match="colon"):
        _ = BasicCredentials("a:b", "c").authorization


def test_neither_user_nor_password_is_shown() -> None:
    assert repr(BasicCredentials("alice", "wonder")) == "BasicCredentials()"


EMPTY_LOGINS = [
    "Basic Og==", "basic Og==", "BASIC  Og== ", "Basic Og", "Basic Og=", "Basic",
    "Basic ", "Basic =", " Basic Og==",
]  # fmt: skip


@pytest.mark.parametrize("field", EMPTY_LOGINS)
def test_empty_logins(field: str) -> None:
    assert is_empty_login(field)


@pytest.mark.parametrize(
    "field",
    [
        "", "Og==", "Bearer Og==", "Bearer", "Bearer ", "Negotiate Og==", "Basic !", "Basic Og==x", "Basic Og== Og==",
        basic_field(b"alice:"), basic_field(b":secret"), basic_field(b"alice"), basic_field(b"::"), basic_field(b" : "),
    ],
)  # fmt: skip
def test_no_empty_logins(field: str) -> None:
    assert not is_empty_login(field)


@given(st.text())
def test_a_login_with_a_user_or_a_password_is_not_empty(field: str) -> None:
    credentials = BasicCredentials.parse(field)
    assert credentials is None or is_empty_login(field) == (credentials == BasicCredentials("", ""))

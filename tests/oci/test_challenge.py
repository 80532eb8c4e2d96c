"""Challenges: well-formed ones from registries, and malformed ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.challenge import Challenge, parse_challenges

tokens = st.from_regex(r"[a-z0-9!#$%&'*+.^_`|~-]{1,10}", fullmatch=True)
values = st.text(
    st.one_of(
        st.just("\t"),
        st.characters(min_codepoint=32, max_codepoint=126),
        st.characters(min_codepoint=160, max_codepoint=255),
    ),
    max_size=20,
)
with_parameters = st.builds(Challenge, tokens, st.dictionaries(tokens, values, max_size=5))
with_token68 = st.builds(
    lambda scheme, text: Challenge(scheme, {}, text),
    tokens,
    st.from_regex(r"[A-Za-z0-9._~+/-]{1,20}={0,2}", fullmatch=True),
)


def single(scheme: str, **parameters: str) -> list[Challenge]:
    return [Challenge(scheme, parameters)]


HUB = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/ubuntu:pull,push"'
HUB_PARAMETERS = {
    "realm": "https://auth.docker.io/token",
    "service": "registry.docker.io",
    "scope": "repository:library/ubuntu:pull,push",
}


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (HUB, single("bearer", **HUB_PARAMETERS)),
        (HUB.replace(",s", ", s"), single("bearer", **HUB_PARAMETERS)),
        (HUB.replace(",s", " ,\ts"), single("bearer", **HUB_PARAMETERS)),
        (HUB.replace("Bearer realm=", "BEARER REALM = "), single("bearer", **HUB_PARAMETERS)),
        ('Basic realm="a\\"b\\\\c, d"', single("basic", realm='a"b\\c, d')),
        ("Basic realm=plain", single("basic", realm="plain")),
        ('Basic realm=""', single("basic", realm="")),
        ("Negotiate", single("negotiate")),
        ("Negotiate a87421000492aa874209af8bc028==", [Challenge("negotiate", {}, "a87421000492aa874209af8bc028==")]),
        ("NTLM TlRM=", [Challenge("ntlm", {}, "TlRM=")]),
        # RFC 9110, section 11.6.1
        (
            'Newauth realm="apps", type=1, title="Login to \\"apps\\"", Basic realm="simple"',
            [*single("newauth", realm="apps", type="1", title='Login to "apps"'), *single("basic", realm="simple")],
        ),
        ('Negotiate, Basic realm="a",, Digest nonce="n" , qop="auth,auth-int"', [
            *single("negotiate"), *single("basic", realm="a"), *single("digest", nonce="n", qop="auth,auth-int")]),
        ('Bearer realm="a",realm="b"', single("bearer", realm="a")),
        # Unreadable challenges are left out.
        ("", []),
        (",,,", []),
        ('realm="a"', []),
        ('Bearer realm="a', []),
        ('Basic realm="a", Bearer realm="b', single("basic", realm="a")),
        ('Bearer realm="a" service="b", Basic realm="c"', single("basic", realm="c")),
        ('Basic realm="a", Bearer realm="b" x, service="c"', single("basic", realm="a")),
        ('Bearer realm="a", ???, service="b"', single("bearer", realm="a", service="b")),
        ('Bearer realm="a", scope=, service="b"', single("bearer", realm="a", service="b")),
        ("Bearer realm=https://a/b", []),
        ('Bearer realm="a\x00b"', []),
        ('Bearer realm="a\r\nX: y"', []),
        ('Bearer realm="\u20ac"', []),
        ('Bé realm="a"', []),
    ],
)  # fmt: skip
def test_field(field: str, expected: list[Challenge]) -> None:
    assert parse_challenges([field]) == expected


def test_several_fields() -> None:
    assert parse_challenges(["Negotiate", HUB]) == [*single("negotiate"), *single("bearer", **HUB_PARAMETERS)]
    assert parse_challenges([]) == []


def test_bounded() -> None:
    assert len(parse_challenges([", ".join(f'a{number} b="c"' for number in range(100))] * 3)) == 16
    many = parse_challenges(["Bearer " + ",".join(f"p{number}=v" for number in range(100))])
    assert [len(challenge.parameters) for challenge in many] == [32]


@given(st.lists(st.one_of(with_parameters, with_token68), max_size=6))
def test_round_trip(challenges: list[Challenge]) -> None:
    rendered = [challenge.render() for challenge in challenges]
    assert parse_challenges(rendered) == challenges
    assert parse_challenges([", ".join(rendered)]) == challenges


@given(st.lists(st.text()))
def test_never_raises(fields: list[str]) -> None:
    for challenge in parse_challenges(fields):
        assert parse_challenges([challenge.render()]) == [challenge]


@given(st.lists(st.text('aB=", \\\t\x00é;'), max_size=3))
def test_never_raises_near_the_grammar(fields: list[str]) -> None:
    for challenge in parse_challenges(fields):
        assert parse_challenges([challenge.render()]) == [challenge]


def test_render() -> None:
    assert parse_challenges([HUB])[0].render() == HUB
    assert Challenge("negotiate").render() == "Negotiate"
    assert Challenge("basic", {"realm": 'a"\\'}).render() == r'Basic realm="a\"\\"'


def test_with_parameter() -> None:
    challenge = Challenge("bearer", {"realm": "a", "service": "s"})
    assert challenge.with_parameter("Realm", "b") == Challenge("bearer", {"realm": "b", "service": "s"})
    assert challenge.with_parameter("scope", "x").parameters == {"realm": "a", "service": "s", "scope": "x"}
    assert challenge.parameters == {"realm": "a", "service": "s"}


@pytest.mark.parametrize("value", ["a\r\nSet-Cookie: b", "a\nb", "a\0b", "\u20ac"])
def test_render_refuses(value: str) -> None:
    with pytest.raises(ValueError):
        Challenge("bearer", {"realm": value}).render()

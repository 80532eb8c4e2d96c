"""Routes: every path of the distribution API, names that look like paths, and ambiguous paths."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from urllib.parse import parse_qsl, quote, unquote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import BadRequest, DigestInvalid, NameInvalid, NameUnknown, RegistryError
from dockerproxy.oci.names import Digest, parse_reference, parse_repository
from dockerproxy.oci.routes import (
    Kind,
    Target,
    is_api_path,
    is_pull_query,
    parse_query,
    pop_parameter,
    route,
    route_hosted,
    split_registry,
    unescape_slashes,
)

DIGEST = "sha256:" + "0a" * 32
NAME = parse_repository("library/ubuntu")

words = st.sampled_from(["blobs", "manifests", "tags", "uploads", "referrers", "list", "v2", "a", "b-c", "d__e", "f.g"])
names = st.lists(words, min_size=1, max_size=5).map("/".join)
tags = st.one_of(words, st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}", fullmatch=True))
digests = st.one_of(
    st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True), st.from_regex(r"sha512:[0-9a-f]{128}", fullmatch=True)
)
sessions = st.from_regex(r"[A-Za-z0-9_=.~-]{1,80}", fullmatch=True).filter(lambda text: text not in (".", ".."))


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/v2", Target(Kind.BASE)),
        ("/v2/", Target(Kind.BASE)),
        ("/v2/_catalog", Target(Kind.CATALOG)),
        ("/v2/library/ubuntu/tags/list", Target(Kind.TAGS, NAME)),
        ("/v2/library/ubuntu/manifests/v1", Target(Kind.MANIFEST, NAME, parse_reference("v1"))),
        (f"/v2/library/ubuntu/manifests/{DIGEST}", Target(Kind.MANIFEST, NAME, Digest.parse(DIGEST))),
        (f"/v2/library/ubuntu/blobs/{DIGEST}", Target(Kind.BLOB, NAME, Digest.parse(DIGEST))),
        (f"/v2/library/ubuntu/blobs/{DIGEST.replace(':', '%3A')}", Target(Kind.BLOB, NAME, Digest.parse(DIGEST))),
        (f"/v2/library/ubuntu/blobs/{DIGEST.replace(':', '%3a')}", Target(Kind.BLOB, NAME, Digest.parse(DIGEST))),
        (f"/v2/library/ubuntu/referrers/{DIGEST}", Target(Kind.REFERRERS, NAME, Digest.parse(DIGEST))),
        ("/v2/library/ubuntu/blobs/uploads/", Target(Kind.UPLOADS, NAME)),
        ("/v2/library/ubuntu/blobs/uploads", Target(Kind.UPLOADS, NAME)),
        ("/v2/library/ubuntu/blobs/uploads/a_B=.~-9", Target(Kind.UPLOAD, NAME, session="a_B=.~-9")),
        (
            "/v2/a/blobs/b/manifests/latest",
            Target(Kind.MANIFEST, parse_repository("a/blobs/b"), parse_reference("latest")),
        ),
        ("/v2/a/tags/list/tags/list", Target(Kind.TAGS, parse_repository("a/tags/list"))),
        ("/v2/a/blobs/uploads/blobs/uploads/", Target(Kind.UPLOADS, parse_repository("a/blobs/uploads"))),
        ("/v2/a/manifests/list", Target(Kind.MANIFEST, parse_repository("a"), parse_reference("list"))),
        ("/%76%32/%5fcatalog", Target(Kind.CATALOG)),
    ],
)
def test_route(path: str, target: Target) -> None:
    assert route(path) == target


@given(names, tags, digests, sessions)
def test_every_kind_by_any_name(name: str, tag: str, digest: str, session: str) -> None:
    repository = parse_repository(name)
    assert route(f"/v2/{name}/tags/list") == Target(Kind.TAGS, repository)
    assert route(f"/v2/{name}/manifests/{tag}") == Target(Kind.MANIFEST, repository, parse_reference(tag))
    assert route(f"/v2/{name}/manifests/{digest}") == Target(Kind.MANIFEST, repository, Digest.parse(digest))
    assert route(f"/v2/{name}/blobs/{quote(digest)}") == Target(Kind.BLOB, repository, Digest.parse(digest))
    assert route(f"/v2/{name}/referrers/{digest}") == Target(Kind.REFERRERS, repository, Digest.parse(digest))
    assert route(f"/v2/{name}/blobs/uploads/") == Target(Kind.UPLOADS, repository)
    assert route(f"/v2/{name}/blobs/uploads/{session}") == Target(Kind.UPLOAD, repository, session=session)


@given(names, tags, digests, sessions, st.sampled_from(["%2F", "%2f"]))
def test_an_escaped_slash_in_a_name_of_the_hosted_registry(
    name: str, tag: str, digest: str, session: str, slash: str
) -> None:
    rests = ("tags/list", f"manifests/{tag}", f"manifests/{digest}", f"blobs/{digest}", f"referrers/{digest}",
             "blobs/uploads", "blobs/uploads/", f"blobs/uploads/{session}")  # fmt: skip
    for rest in rests:
        path = f"/v2/{name.replace('/', slash)}/{rest}"
        assert route_hosted(path) == route_hosted(f"/v2/{name}/{rest}") == route(f"/v2/{name}/{rest}")
        if slash in path:
            with pytest.raises(NameInvalid):
                route(path)


hosts = st.sampled_from(["quay.io", "localhost", "localhost:5000", "registry.example:5000", "a:1", "10.0.0.1", "x.y.z"])


@given(hosts, names, st.data())
def test_a_host_in_the_path_is_split_off(host: str, name: str, data: st.DataObject) -> None:
    """In every spelling that a component may have."""
    spelled = "".join(data.draw(st.sampled_from([c, f"%{ord(c):02x}", f"%{ord(c):02X}"])) for c in host)
    for rest in (f"{name}/tags/list", f"{name}/manifests/1", "", "_catalog"):
        assert split_registry(f"/v2/{spelled}/{rest}") == (host, f"/v2/{rest}")
    path = unescape_slashes(f"/v2/{spelled}%2F{name}/tags/list")
    assert split_registry(path) == (host, f"/v2/{name}/tags/list")
    assert split_registry(f"/v2/{spelled}") == (host, "/v2/")


@given(names)
def test_a_repository_is_no_host(name: str) -> None:
    path = f"/v2/{name}/tags/list"
    first = name.partition("/")[0]
    assert split_registry(path) == ((first, f"/v2/{path[4:].partition('/')[2]}") if "." in first else (None, path))
    for other in ("/v2/", "/v2", "/v2/_catalog", "/v2/token", f"/x/{name}"):
        assert split_registry(other) == (None, other)


@pytest.mark.parametrize(
    "path",
    ["/v2%2Fa/tags/list", "/v2/a%2Ftags/list", "/v2/a/tags%2Flist", "/v2/a%2Ftags%2Flist", "/v2%2Fa%2Ftags%2Flist",
     "/v2/a/manifests%2Fb", "/v2/a/manifests/b%2Fc", f"/v2/a/blobs%2F{DIGEST}", f"/v2/a/blobs%2Fuploads/{DIGEST}",
     "/v2/a/blobs/uploads%2Fx", "/v2/a/blobs/uploads/x%2Fy", "/v2/a%252Fb/tags/list", "/v2/a%2F%2Fb/tags/list",
     "/v2/%2Fa/tags/list", "/v2/a%2F/tags/list", "/v2/a%2F..%2Fb/tags/list", "/v2/a%2F.%2Fb/tags/list",
     "/v2/%2e%2e/tags/list", "/v2/a%2F%2e%2e/tags/list", "/v2/a%5Cb/tags/list", "/v2/a%2F;b/tags/list", "/v2/%2F",
     "/v2/%2F/tags/list", "/v2/a%2FB/tags/list", "/v2/a%2F_uploads/tags/list", "/%2Fv2/a/tags/list"],
)  # fmt: skip
def test_other_escaped_slashes_are_refused(path: str) -> None:
    with pytest.raises((NameInvalid, NameUnknown, DigestInvalid)):
        route_hosted(path)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("", NameUnknown),
        ("/", NameUnknown),
        ("v2/", NameInvalid),
        ("v2", NameInvalid),
        ("//v2/", NameInvalid),
        ("/x/../v2/", NameInvalid),
        ("/%252576%32/_catalog", NameInvalid),
        ("/\\v2/_catalog", NameInvalid),
        ("/v2;x/_catalog", NameInvalid),
        ("/caf%C3%A9/a%20b;c//d/../e", NameUnknown),
        ("/a/v2/", NameUnknown),
        ("/v1/a/manifests/b", NameUnknown),
        ("/v2x/", NameUnknown),
        ("/V2/", NameInvalid),
        ("/v2//", NameInvalid),
        ("/v2//admin", NameInvalid),
        ("/v2/x//", NameInvalid),
        ("/v2/..;/x", NameInvalid),
        ("/v2/.;/x", NameInvalid),
        ("/v2/..%3b/x", NameInvalid),
        ("/v2/..%3B/x", NameInvalid),
        ("/v2/..\\x", NameInvalid),
        ("/v2/..%5cx", NameInvalid),
        ("/v2/..%5Cx", NameInvalid),
        ("/v2/%c0%ae%c0%ae/x", NameInvalid),
        ("/v2/%252e%252e/x", NameInvalid),
        ("/v2/a;x=1/tags/list", NameInvalid),
        ("/v2/a", NameUnknown),
        ("/v2/_catalog/", NameUnknown),
        ("/v2/a/tags", NameUnknown),
        ("/v2/a/tags/list/", NameUnknown),
        ("/v2/a/tags/other", NameUnknown),
        (f"/v2/a/blobs/{DIGEST}/x", NameUnknown),
        ("/v2/a/blobs/uploads/s/x", NameUnknown),
        ("/v2/tags/list", NameInvalid),
        ("/v2/manifests/latest", NameInvalid),
        ("/v2/blobs/uploads/", NameInvalid),
        ("/v2/A/manifests/latest", NameInvalid),
        ("/v2/a//manifests/latest", NameInvalid),
        ("/v2/a/manifests/", NameInvalid),
        ("/v2/a/manifests/.x", NameInvalid),
        ("/v2/a/manifests/" + "x" * 129, NameInvalid),
        ("/v2/a/blobs/uploads/x:y", NameInvalid),
        ("/v2/a/blobs/uploads/" + "x" * 513, NameInvalid),
        ("/v2/a/manifests/sha256:00", DigestInvalid),
        ("/v2/a/blobs/latest", DigestInvalid),
        ("/v2/a/blobs/", DigestInvalid),
        ("/v2/a/referrers/latest", DigestInvalid),
        ("/v2/a%2Fb/manifests/latest", NameInvalid),
        ("/v2/a%2fb/manifests/latest", NameInvalid),
        ("/v2/a/manifests%2flatest", NameInvalid),
        ("/v2/a%252Fb/manifests/latest", NameInvalid),
        ("/v2/a%00/manifests/latest", NameInvalid),
        ("/v2/a/manifests/latest%0d%0aX:", NameInvalid),
        ("/v2/a/manifests/latest%20", NameInvalid),
        ("/v2/a/manifests/caf%C3%A9", NameInvalid),
        ("/v2/a/manifests/%", NameInvalid),
        ("/v2/a/manifests/%4", NameInvalid),
        ("/v2/a/manifests/%zz", NameInvalid),
        ("/v2/a/manifests/%+1", NameInvalid),
        ("/v2/a/manifests/é", NameInvalid),
        ("/v2/a/manifests/a b", NameInvalid),
        ("/v2/a/manifests/a\0", NameInvalid),
        ("/v2/a/manifests/a\n", NameInvalid),
        ("/v2/a/../b/manifests/latest", NameInvalid),
        ("/v2/a/./manifests/latest", NameInvalid),
        ("/v2/a/%2e%2E/b/manifests/latest", NameInvalid),
        ("/v2/a/.%2e/manifests/latest", NameInvalid),
        ("/v2/../etc", NameInvalid),
        ("/../v2/", NameInvalid),
        ("/v2/a/blobs/uploads/..", NameInvalid),
        ("/v2/a/blobs/uploads/%2e", NameInvalid),
        ("/v2/a\\..\\b/manifests/latest", NameInvalid),
    ],
)
def test_invalid_path(path: str, error: type[RegistryError]) -> None:
    with pytest.raises(error) as caught:
        route(path)
    assert type(caught.value) is error


segments = st.sampled_from(
    ["v2", "a", "blobs", "uploads", "manifests", "tags", "list", DIGEST, "", ".", "..", "%2e", "%2f"]
)


@given(st.one_of(st.text().map("/".__add__), st.lists(segments).map(lambda parts: "/v2/" + "/".join(parts))))
def test_any_path(path: str) -> None:
    try:
        target = route(path)
    except (NameInvalid, NameUnknown, DigestInvalid):
        return
    assert (target.name == "") == (target.kind in (Kind.BASE, Kind.CATALOG))
    assert (target.reference != "") == (target.kind in (Kind.MANIFEST, Kind.BLOB, Kind.REFERRERS))
    assert (target.session != "") == (target.kind is Kind.UPLOAD)
    if target.name:
        assert parse_repository(target.name) == target.name
    if target.kind in (Kind.BLOB, Kind.REFERRERS):
        assert target.digest == target.reference


escapes: st.SearchStrategy[Callable[[str], str]] = st.sampled_from(
    [str, lambda c: f"%{ord(c):02x}", lambda c: f"%{ord(c):02X}", lambda c: f"%25{ord(c):02x}"]
)
tricks = st.sampled_from(["..", ".", "..;", ".;x", "", "..\\", "a\\b", ";", "a;b=c", "\0", "\r\n", "a/..", "\x7f"])


@given(st.lists(words, max_size=3), tricks, st.lists(words, min_size=1, max_size=3), st.data())
def test_ambiguous_segments_in_any_escaping(
    before: list[str], trick: str, after: list[str], data: st.DataObject
) -> None:
    """Each character of the trick is escaped in a way of its own. No such path has a target, or leaves the API."""
    spelled = "".join(data.draw(escapes)(character) for character in trick)
    with pytest.raises(NameInvalid):
        route("/v2/" + "/".join([*before, spelled, *after]))


@given(
    st.lists(
        st.sampled_from(["v2", "V2", "..", ".", "", "x", ";", "..;", "%76%32", "%2e%2e", "%2f", "%5c"]), max_size=8
    )
)
def test_no_path_is_below_v2_for_a_liberal_server_only(parts: list[str]) -> None:
    """A path that leads to the API for a server that resolves everything is never passed on as a web page's."""
    path = "/" + "/".join(parts)
    liberal = posixpath.normpath(re.sub(r"/+", "/", unquote(path).replace("\\", "/").replace(";", ""))).lower()
    if liberal == "/v2" or liberal.startswith("/v2/"):
        assert is_api_path(path)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", True), ("n=5&last=a%2Fb", True), ("artifactType=x&last=y", True), ("next_page=gAAA", True), ("n=", True),
        ("n=5&access_token=x", False), ("_method=DELETE", False), ("scope=repository:x:pull", False),
    ],
)  # fmt: skip
def test_pull_query(query: str, expected: bool) -> None:
    assert is_pull_query(query) is expected


def test_a_tag_is_no_digest() -> None:
    with pytest.raises(ValueError, match="latest"):
        _ = route("/v2/a/manifests/latest").digest


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(texts.filter(bool), texts), max_size=8))
def test_parse_query_agrees_with_the_standard_library(pairs: list[tuple[str, str]]) -> None:
    query = urlencode(pairs)
    assert parse_query(query) == pairs == parse_qsl(query, keep_blank_values=True)


def test_query_forms() -> None:
    assert parse_query("") == []
    assert parse_query("a&b=&=c&&d=e=f&g=+%2B") == [("a", ""), ("b", ""), ("", "c"), ("d", "e=f"), ("g", " +")]
    assert parse_query("a;b=c") == [("a;b", "c")]


@pytest.mark.parametrize("query", ["a=%", "a=%4", "a=%zz", "%=a", "a=%ff", "a=" + "x" * 8192, "&".join("a" * 101)])
def test_invalid_query(query: str) -> None:
    with pytest.raises(BadRequest):
        parse_query(query)


parts = st.from_regex(r"[a-m%&=+]{0,12}", fullmatch=True)


@given(parts, parts)
def test_pop_parameter_leaves_the_rest_unchanged(before: str, after: str) -> None:
    assert pop_parameter(f"{before}&ns=quay.io%3A5000&{after}", "ns") == ("quay.io:5000", f"{before}&{after}")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", (None, "")),
        ("ns=a", ("a", "")),
        ("ns=", ("", "")),
        ("ns", ("", "")),
        ("x=1&ns=a&y=%7e", ("a", "x=1&y=%7e")),
        ("n%73=a&x", ("a", "x")),
        ("ns=a&x=1&ns=a", ("a", "x=1")),
        ("NS=a&nsx=b", (None, "NS=a&nsx=b")),
        ("x=%zz&&ns=docker.io&", ("docker.io", "x=%zz&&")),
    ],
)
def test_pop_parameter(query: str, expected: tuple[str | None, str]) -> None:
    assert pop_parameter(query, "ns") == expected


@pytest.mark.parametrize("query", ["ns=a&ns=b", "ns=%ff", "ns=%zz", "x=" + "y" * 8192])
def test_pop_parameter_invalid(query: str) -> None:
    with pytest.raises(BadRequest):
        pop_parameter(query, "ns")

"""One harness for each parser of what strangers send. A harness takes any bytes.

It lets through the exceptions that the parser documents, and fails with any other one or if a property does not hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dockerproxy import parsers
from dockerproxy.admin.arguments import InvalidArguments, parse_body, parse_pairs
from dockerproxy.admin.control import CHECK, COLLECT, IMPORT, LIST, REMOVE
from dockerproxy.admin.setup import setup_script
from dockerproxy.cache.challenges import Realm
from dockerproxy.cache.identity import INVALID_TOKEN, Identities, LocalToken
from dockerproxy.errors import (
    BadRequest,
    DigestInvalid,
    ManifestInvalid,
    MisdirectedRequest,
    NameInvalid,
    NameUnknown,
    RangeInvalid,
    RegistryError,
    UpstreamBroken,
)
from dockerproxy.http.cross_origin import is_own_origin
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import (
    ChunkedDecoder,
    absolute_form,
    authority_form,
    body_framing,
    expects_continue,
    keeps_alive,
    may_become_head,
    origin_form,
    parse_head,
    render_head,
)
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.oci.challenge import parse_challenges
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.lists import elements
from dockerproxy.oci.manifests import (
    accept_key,
    accept_set,
    data_type,
    filter_referrers,
    media_type_of,
    parse_manifest,
)
from dockerproxy.oci.names import Digest, Host, Registry, parse_reference, parse_repository, parse_tag
from dockerproxy.oci.paging import Page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.ranges import content_range, parse_content_range, parse_ranges
from dockerproxy.oci.referrers import ReferrersQuery
from dockerproxy.oci.routes import is_api_path, is_pull_query, parse_query, pop_parameter, route
from dockerproxy.oci.tokens import TokenResponse, readable_repositories
from dockerproxy.oci.uploads import UploadParameters, declared_length
from dockerproxy.proxy.host_rule import HostRule
from dockerproxy.proxy.trusted_proxies import TrustedProxies
from dockerproxy.registry.htpasswd import HtpasswdError, parse_htpasswd
from dockerproxy.registry.responses import upstream_fields
from dockerproxy.settings import Settings, SettingsError, read_env_file
from dockerproxy.store.references import extract_references
from dockerproxy.upstream.http1 import (
    BodyReader,
    body_reader_for,
    find_head_end,
    parse_response_head,
    render_request_head,
    should_keep_alive,
)
from dockerproxy.upstream.retry import MAX_RETRY_AFTER, parse_retry_after
from dockerproxy.upstream.urls import resolve_location, split_url

NOW = 1_700_000_000.0
HUB = Registry.parse("registry-1.docker.io")

Harness = Callable[[bytes], None]


def request_head(data: bytes) -> None:
    """The head of a request."""
    try:
        head = parse_head(data)
    except BadRequest:
        return
    assert all(may_become_head(data[:end]) for end in range(0, len(data), 1 + len(data) // 50))
    for form in (authority_form, absolute_form, origin_form):
        with suppress(BadRequest, NameInvalid):
            form(head.target)
    length = body_framing(head)
    assert length is None or 0 <= length < 10**18
    keeps_alive(head), expects_continue(head)
    fields = "".join(f"{name}: {value}\r\n" for name, value in head.headers)
    version = ".".join(map(str, head.version))
    assert parse_head(f"{head.method} {head.target} HTTP/{version}\r\n{fields}"[:-2].encode("latin-1")) == head
    render_head(200, upstream_fields(head.headers))


def chunked(data: bytes) -> None:
    """The chunked coding: content, end and error do not depend on how the bytes arrive."""
    split, body = data[:1], data[1:]
    step = 1 + (split[0] % 7 if split else 0)
    whole = _decode([body])
    parts = _decode(body[position : position + step] for position in range(0, len(body), step))
    assert whole[1:] == parts[1:]
    assert whole[0].startswith(parts[0]) or parts[0].startswith(whole[0])
    assert whole[2] or whole[0] == parts[0]


def _decode(parts: Iterable[bytes]) -> tuple[bytes, bytes | None, str]:
    """Return the content, the bytes after its end (None if it has not ended), and the error."""
    decoder, content, rest = ChunkedDecoder(), b"", b""
    for part in parts:
        if decoder.done:
            rest += part
            continue
        try:
            content += b"".join(decoder.feed(part))
        except BadRequest as error:
            return content, None, error.message
    return content, decoder.unused_data + rest if decoder.done else None, ""


def response_head(data: bytes) -> None:
    """The head of a response from upstream, and the body behind it."""
    end = find_head_end(data) or (len(data), len(data))
    raw, body = data[: end[0]], data[end[1] :]
    try:
        head = parse_response_head(raw)
        readers = body_reader_for("GET", head), body_reader_for("GET", head)
    except ValueError:
        return
    assert 100 <= head.status <= 599
    should_keep_alive(head)
    parse_retry_after(head.headers, NOW)
    render_head(head.status, upstream_fields(head.headers))
    whole = _read_body(readers[0], [body])
    parts = _read_body(readers[1], (body[position : position + 3] for position in range(0, len(body), 3)))
    assert whole[1:] == parts[1:]


def _read_body(reader: BodyReader, parts: Iterable[bytes]) -> tuple[bytes, bool, str]:
    content = b""
    for part in parts:
        if reader.done or not part:
            continue
        try:
            content += b"".join(reader.feed(part))
        except ValueError as error:
            return content, False, str(error)
    return content, reader.done, reader.read_eof() or ""


def header_lists(data: bytes) -> None:
    """Challenges and other lists in fields."""
    text = data.decode("latin-1")
    challenges = parse_challenges([text])
    for challenge in challenges:
        try:
            rendered = challenge.render()
        except ValueError:
            continue
        assert parse_challenges([rendered]) == [challenge]
        Realm.parse(challenge.parameters.get("realm", ""))
    assert all(element.strip(" \t") == element for element in elements(text))
    accept_key(accept_set([text]))
    assert data_type(data_type(text)) == data_type(text)


_REVERSE_PROXY = "10.0.0.5"
_TRUSTED_PROXIES = TrustedProxies(AddressSet.parse(_REVERSE_PROXY))


def forwarded_fields(data: bytes) -> None:
    """The fields of a reverse proxy, which appends the client to what the client claims."""
    text = data.decode("latin-1")
    for fields in (
        [("X-Forwarded-For", f"{text}, 192.0.2.7")],
        [("Forwarded", f"{text}, for=192.0.2.7")],
        [("X-Forwarded-For", "192.0.2.7"), ("X-Forwarded-Proto", text), ("X-Forwarded-Host", text)],
    ):
        with suppress(BadRequest):
            client = _TRUSTED_PROXIES.client_of(_REVERSE_PROXY, Headers(fields))
            assert client is not None and client.address == "192.0.2.7"
            assert client.scheme in (None, "http", "https")
            assert client.host is None or Host.parse(client.host)
        assert _TRUSTED_PROXIES.client_of("192.0.2.1", Headers(fields)) is None


def names(data: bytes) -> None:
    """Names of repositories, tags, digests, hosts and registries."""
    text = data.decode("utf-8", "surrogateescape")
    for parse in (parse_repository, parse_tag):
        with suppress(NameInvalid):
            assert parse(text) == text
    with suppress(DigestInvalid):
        assert str(Digest.parse(text)) == text
    with suppress(NameInvalid, DigestInvalid):
        assert str(parse_reference(text)) == text
    with suppress(NameInvalid):
        host = Host.parse(text)
        assert Host.parse(str(host)) == Host.parse(host.authority) == host
    with suppress(NameInvalid):
        registry = Registry.parse(text)
        assert Registry.parse(registry.origin) == registry
        assert split_url(registry.origin + "/v2/") == (registry, "/v2/")


def routes(data: bytes) -> None:
    """Paths, queries and ranges of requests to a registry."""
    text = data.decode("latin-1")
    path, _, query = text.partition("?")
    try:
        target = route(path)
        assert is_api_path(path)
        assert not any(bad in path for bad in ("//", "\\", ";", "%2f", "%2F", "%25"))
        assert ".." not in path.split("/")
        assert target.name == "" or parse_repository(target.name)
    except (NameInvalid, NameUnknown, DigestInvalid):
        pass
    with suppress(BadRequest):
        pairs = parse_query(query)
        is_pull_query(query)
        for name, _value in pairs[:3]:
            with suppress(BadRequest):
                value, rest = pop_parameter(query, name)
                assert value is not None and len(rest) < len(query)
    for parse in (UploadParameters.parse, ReferrersQuery.parse, lambda query: Page.parse(query, 100)):
        with suppress(RegistryError):
            parse(query)
    for size in (0, 1, 1000, 2**63 - 1):
        with suppress(RangeInvalid):
            for selected in parse_ranges(text, size):
                assert 0 <= selected.start < selected.stop <= size
                parsed = parse_content_range(content_range(selected, size))
                assert parsed == (selected.start, selected.stop, size)
    with suppress(ValueError):
        start, stop, total = parse_content_range(text)
        assert start < stop and (total is None or stop <= total)
    with suppress(RegistryError):
        declared_length(text, 5, 10)


def manifests(data: bytes) -> None:
    """Manifests, as they are pushed and as upstream sends them. The first line is the declared media type."""
    first, _, content = data.partition(b"\n")
    media_type = first.decode("latin-1")
    for declared in (media_type, None):
        with suppress(ManifestInvalid):
            manifest = parse_manifest(content, declared)
            extract_references(content, manifest.media_type)
    with suppress(ManifestInvalid):
        media_type_of(content)
        json.loads(filter_referrers(content, media_type))
    with suppress(ManifestInvalid, DigestInvalid):
        pushed = PushedManifest.parse(content, None, media_type)
        assert Digest.of(content) == pushed.digest
        assert data_type(pushed.media_type) == pushed.media_type
        list(pushed.required_references())
        if pushed.referrer is not None:
            json.loads(json.dumps(pushed.referrer.descriptor).encode())
        extract_references(content, pushed.media_type)


def token_response(data: bytes) -> None:
    """The response of a token server."""
    readable_repositories([data.decode("latin-1")])
    try:
        response = TokenResponse.parse(data, NOW)
    except ValueError:
        return
    assert 0 < response.lifetime < 10**9
    for token in response.tokens:
        render_request_head("GET", "/", [("Authorization", f"Bearer {token}")])
    readable_repositories([response.scope or ""])


def urls(data: bytes) -> None:
    """URLs and dates from upstream, and the address in the set-up script."""
    text = data.decode("latin-1")
    with suppress(UpstreamBroken):
        registry, target = split_url(text)
        assert split_url(registry.origin + target) == (registry, target)
    with suppress(UpstreamBroken):
        split_url(resolve_location("https://registry.example.com/v2/a/blobs/x?y=z", text))
    wait = parse_retry_after(Headers([("retry-after", text)]), NOW)
    assert wait is None or 0 <= wait <= MAX_RETRY_AFTER
    with suppress(ValueError):
        script = setup_script(f"http://{text}/")
        assert not set(text) & set("'\"`$ \n")
        assert script.startswith("#!/bin/sh")
    for secure in (False, True):
        assert not is_own_origin(text, "registry.example.com", secure=secure) or "registry.example.com" in text.lower()
    with suppress(MisdirectedRequest):
        HostRule(names=frozenset({"ours"})).check(text)


def settings(data: bytes) -> None:
    """A .env file and an htpasswd file."""
    fd = os.memfd_create("env")
    try:
        os.write(fd, data)
        path = Path(f"/proc/self/fd/{fd}")
        with suppress(SettingsError):
            variables = read_env_file(path)
            Settings.from_environment({}, variables)
    finally:
        os.close(fd)
    try:
        users = parse_htpasswd(data.decode("utf-8", "replace"), Path("users"), "HTPASSWD_FILE")
    except HtpasswdError as error:
        assert "$2" not in str(error)
        return
    assert all(hashed.startswith(b"$2") for hashed in users.values())


def setting_values(data: bytes) -> None:
    """The value of one setting: logins of registries, lists of addresses, destinations and origins."""
    text = data.decode("utf-8", "surrogateescape").strip()
    if not text:
        return
    parse: Callable[[str], Any]
    for parse in (
        AddressSet.parse,
        Destinations.parse,
        parsers.addresses,
        parsers.origins,
        parsers.registry_url,
        parsers.trusted_proxies,
        parsers.allowed_hosts,
        parsers.registries,
        parsers.duration,
        parsers.size,
        parsers.endpoints,
        lambda text: parsers.upstream_proxy(text, text),
    ):
        with suppress(ValueError):
            parse(text)
    for entry_delimiter, field_delimiter in ((" ", ":"), (";;", "|")):
        try:
            logins = parsers.logins(text, entry_delimiter, field_delimiter, [])
        except ValueError:
            continue
        for login in logins.values():
            assert login.user in text and login.password in text
            assert login.password not in repr(login) or len(login.password) < 20


def tokens(data: bytes) -> None:
    """Authorization fields: tokens that we have issued, those that we have not, and logins."""
    text = data.decode("latin-1")
    identities = Identities(b"secret", lambda: NOW)
    assert identities.read_token(text) in (None, INVALID_TOKEN)
    assert identities.read_token(f"Bearer {text}") in (None, INVALID_TOKEN)
    issued = identities.issue_token("own:x")
    assert identities.read_token(f"Bearer {issued}") == LocalToken("own:x")
    if data:
        position, bit = data[0] % len(issued), 1 << data[-1] % 7
        altered = issued[:position] + chr(ord(issued[position]) ^ bit) + issued[position + 1 :]
        # The last characters of base64 may have bits without a meaning.
        assert identities.read_token(f"Bearer {altered}") in (None, INVALID_TOKEN) or position >= len(issued) - 3
    for field in (text, f"Basic {text}"):
        credentials = BasicCredentials.parse(field)
        if credentials is not None and ":" not in credentials.user:
            assert BasicCredentials.parse(credentials.authorization) == credentials


def control_requests(data: bytes) -> None:
    """The arguments that the control socket gets."""
    for known, required in ((COLLECT, None), (REMOVE, "names"), (IMPORT, "directory"), (CHECK, None)):
        try:
            arguments = parse_body(data, known, required)
        except InvalidArguments as error:
            assert len(str(error)) < 500
            continue
        assert 0 <= arguments.get("grace", 0) <= 10**9
        os.fsencode(arguments.get("directory", "/"))
        json.dumps(arguments)
    with suppress(InvalidArguments, BadRequest):
        parse_pairs(parse_query(data.decode("latin-1")), LIST)


HARNESSES: dict[str, Harness] = {
    harness.__name__: harness
    for harness in (
        request_head,
        chunked,
        response_head,
        header_lists,
        forwarded_fields,
        names,
        routes,
        manifests,
        token_response,
        urls,
        settings,
        setting_values,
        tokens,
        control_requests,
    )
}

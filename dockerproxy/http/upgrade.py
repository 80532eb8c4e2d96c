"""Requests to change the protocol of a connection (RFC 9110, section 7.8), such as to WebSocket (RFC 6455). Pure."""

from __future__ import annotations

import re

from dockerproxy.http.headers import Headers
from dockerproxy.http.message import RequestHead
from dockerproxy.oci.lists import TOKEN

_PROTOCOL = re.compile(rf"{TOKEN}(?:/{TOKEN})?")

# In these a client sends further requests, which have to be seen: one that writes may be forbidden, for example. A
# server may ignore the field, so a client without an answer to it goes on with what it has.
_PROTOCOLS_OF_REQUESTS = frozenset({"h2", "h2c", "http", "tls"})


def requested_protocols(head: RequestHead) -> str | None:
    """Return the protocols that the client would like to speak, as a value of Upgrade, or None without any.

    Those that only carry further requests, such as HTTP/2, are left out.
    """
    if head.version != (1, 1) or "upgrade" not in _members(head.headers, "connection"):
        return None
    protocols = [
        protocol
        for value in head.headers.all("upgrade")
        for protocol in (entry.strip(" \t") for entry in value.split(","))
        if _PROTOCOL.fullmatch(protocol) and _name(protocol) not in _PROTOCOLS_OF_REQUESTS
    ]
    return ", ".join(protocols) or None


def switches_as_requested(requested: str | None, headers: Headers) -> bool:
    """Return whether the response to a request with `requested` in Upgrade names protocols of these, and no other."""
    names = {_name(protocol) for protocol in (requested or "").lower().split(",")}
    switched = {_name(protocol) for protocol in _members(headers, "upgrade")}
    return bool(switched) and switched <= names


def _members(headers: Headers, field: str) -> set[str]:
    members = {entry.strip(" \t").lower() for value in headers.all(field) for entry in value.split(",")}
    return members - {""}


def _name(protocol: str) -> str:
    return protocol.partition("/")[0].strip(" \t").lower()

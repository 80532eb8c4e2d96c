"""Logins that hold for a connection instead of a request.

HTTP authentication is per request (RFC 9110, section 11), but Microsoft's NTLM and Negotiate log a connection in (RFC
4559, section 6): the server then answers every request on it as that user's. Such a connection must never be used for
another client. Pure.
"""

from __future__ import annotations

from dockerproxy.http.headers import Headers
from dockerproxy.oci.challenge import parse_challenges

# IANA's registry of schemes without Negotiate, and those of object stores. Others may belong to a connection.
_PER_REQUEST_SCHEMES = frozenset(
    "basic bearer concealed digest dpop gnap hoba mutual oauth privatetoken scram-sha-1 scram-sha-256 vapid "
    "aws aws4-hmac-sha256 goog4-rsa-sha256 sharedkey sharedkeylite token".split()
)


def request_logs_in(headers: Headers) -> bool:
    """Return whether a request with these fields may log its connection in."""
    return any(value.split(" ", 1)[0].lower() not in _PER_REQUEST_SCHEMES for value in headers.all("authorization"))


def response_logs_in(status: int, headers: Headers) -> bool:
    """Return whether a response asks for such a login, or continues its handshake."""
    if status not in (401, 407):
        return False
    challenges = parse_challenges([*headers.all("www-authenticate"), *headers.all("proxy-authenticate")])
    return any(challenge.scheme not in _PER_REQUEST_SCHEMES for challenge in challenges)

"""Logins: user names and passwords as HTTP's Basic scheme has them (RFC 7617), and identity tokens."""

from __future__ import annotations

import base64
import binascii

from attrs import field, frozen

_MAX_FIELD = 4096
_MAX_EMPTY_FIELD = 64  # characters of spaces and padding that an empty login may have


@frozen
class BasicCredentials:
    """A user and a password. A password that is not UTF-8 has surrogate escapes, so that none of its bytes is lost."""

    user: str = field(repr=False)
    password: str = field(repr=False)

    @classmethod
    def parse(cls, authorization: str) -> BasicCredentials | None:
        """Return the credentials in an Authorization field; None if the scheme is not Basic or the value is invalid."""
        scheme, _, encoded = authorization.partition(" ")
        if scheme.lower() != "basic" or len(encoded) > _MAX_FIELD:
            return None
        try:
            user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
            return cls(user.decode("utf-8"), password.decode("utf-8", "surrogateescape")) if colon else None
        except (binascii.Error, ValueError):
            return None

    @property
    def password_bytes(self) -> bytes:
        """The password as it was sent."""
        return self.password.encode("utf-8", "surrogateescape")

    @property
    def authorization(self) -> str:
        """The value of an Authorization field. Raise ValueError if the user name contains a colon."""
        if ":" in self.user:
            raise ValueError("a user name must not contain a colon")
        return "Basic " + base64.b64encode(self.user.encode() + b":" + self.password_bytes).decode("ascii")


@frozen
class IdentityToken:
    """An OAuth 2 refresh token, which docker calls an identity token. Token servers take it, registries do not."""

    token: str = field(repr=False)

    @property
    def user(self) -> str:
        """The user name that docker's credential helpers return with an identity token."""
        return IDENTITY_TOKEN_USER


IDENTITY_TOKEN_USER = "<token>"

Login = BasicCredentials | IdentityToken


def is_empty_login(authorization: str) -> bool:
    """Return whether an Authorization field is Basic without a user and a password, which is no login.

    skopeo, podman and others send ``Basic Og==``, an empty user and password, if they have no login.
    """
    scheme, _, encoded = authorization.strip().partition(" ")
    if scheme.lower() != "basic" or len(encoded) > _MAX_EMPTY_FIELD:
        return False
    text = encoded.strip().rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True) in (b"", b":")
    except (binascii.Error, ValueError):
        return False

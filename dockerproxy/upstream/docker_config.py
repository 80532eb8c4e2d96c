"""The logins in a file such as ``~/.docker/config.json`` (DOCKER_CONFIG_FILE). Pure.

The format is that of docker/cli (cli/config/configfile) and of containers-auth.json(5), which have ``auths`` in common:
a registry's key maps to ``auth`` (base64 of user:password), ``username`` and ``password``, or ``identitytoken``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.docker_hub import canonical_host
from dockerproxy.oci.host_table import HostKey, parse_host_key
from dockerproxy.oci.untrusted_json import JSONInvalid, parse_json

HELPER_NAME = re.compile(r"[A-Za-z0-9_.-]+")

_ROOT_PATHS = frozenset({"", "v1", "v2"})


@frozen
class DockerConfig:
    """The content of the file.

    A host in `helpers` (``credHelpers``) gets its login from that helper only. All others get theirs from
    `default_helper` (``credsStore``) if there is one, else from `logins` (``auths``): docker does the same. `warnings`
    are sentences about entries that are not used.
    """

    logins: Mapping[HostKey, Login] = field(factory=dict, repr=False)
    helpers: Mapping[HostKey, str] = field(factory=dict)
    default_helper: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, content: bytes) -> DockerConfig:
        """Parse the file. Raise ValueError with the end of a sentence about it. Unknown fields are ignored."""
        try:
            document = parse_json(content)
        except JSONInvalid as error:
            raise ValueError(str(error)) from None
        if not isinstance(document, dict):
            raise ValueError("is not a JSON object")
        warnings: list[str] = []
        helpers: dict[HostKey, str] = {}
        for key, name in _object(document, "credHelpers").items():
            if (host := parse_key(key, warnings)) is not None:
                helpers[host] = _helper_name(name)
        logins: dict[HostKey, Login] = {}
        for key, entry in _object(document, "auths").items():
            login = _login(key, entry)
            host = parse_key(key, warnings)
            # A key without a path is the newer form, and wins.
            if host is not None and login is not None and (host not in logins or "/" not in key):
                logins[host] = login
        default = document.get("credsStore")
        default_helper = _helper_name(default) if default else None
        return cls(logins, helpers, default_helper, tuple(warnings))


def parse_key(key: str, warnings: list[str]) -> HostKey | None:
    """Return the host of ``host``, ``host:port``, ``https://host/v2/`` or ``https://index.docker.io/v1/``.

    Docker Hub has one key. Return None, and append a sentence to `warnings`, if the key is for a part of a registry, or
    cannot be read.
    """
    scheme, separator, rest = key.rpartition("://")
    authority, _, path = rest.partition("/")
    if path.strip("/") not in _ROOT_PATHS:
        warnings.append(
            f"its entry {_shown(key)} is not used, because it is for a part of a registry, and the proxy has one login"
            " for each registry"
        )
        return None
    try:
        host = parse_host_key(authority, 80 if scheme == "http" and separator else 443)
    except NameInvalid:
        warnings.append(f"its entry {_shown(key)} is not used, because it is not a registry's")
        return None
    return canonical_host(host)


def _shown(key: str) -> str:
    """Return `key` for the log, without a login in it: people write URLs such as ``https://user:password@host``."""
    return repr(key.rpartition("@")[2][:200])


def _object(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"has {name}, which is not a JSON object")
    return value


def _helper_name(value: object) -> str:
    if not isinstance(value, str) or not HELPER_NAME.fullmatch(value):
        raise ValueError("names a credential helper that is not a name of letters, digits, '_', '.' and '-'")
    return value


def _login(key: str, entry: object) -> Login | None:
    """Return the login of an entry of ``auths``; None if it has none, because a helper has it.

    Docker takes a user name and password from ``auth`` if it is there.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"has an entry {_shown(key)} that is not a JSON object")
    values = {name: entry.get(name) or "" for name in ("auth", "username", "password", "identitytoken")}
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"has an entry {_shown(key)} with a value that is not a text")
    if values["identitytoken"]:
        return IdentityToken(_sendable(key, values["identitytoken"]))
    user, password = values["username"], values["password"]
    if values["auth"]:
        try:
            user, colon, password = base64.b64decode(values["auth"], validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            colon = ""
        if not colon:
            raise ValueError(f"has an entry {_shown(key)} whose auth is not base64 of USER:PASSWORD")
        password = password.rstrip("\0")  # as docker does
    if not user and not password:
        return None
    if ":" in user:
        raise ValueError(f"has an entry {_shown(key)} whose user name has a colon")
    return BasicCredentials(_sendable(key, user) if user else "", _sendable(key, password))


def _sendable(key: str, text: str) -> str:
    if not text or any(character < " " or character == "\x7f" for character in text):
        raise ValueError(f"has an entry {_shown(key)} with an empty password, or with control characters")
    return text

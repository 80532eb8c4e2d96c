"""The words that the shell proposes, which the running daemon knows."""

from __future__ import annotations

import re
from urllib.parse import urlencode

from dockerproxy.control_client import CommandError, ControlClient

_TIMEOUT = 2.0  # seconds that the user waits for words at most
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")  # no character of these means anything to a shell


def complete_names(socket: str | None, prefix: str, where: str | None) -> list[str]:
    """Return names of repositories or images that begin with `prefix`. It is empty if the daemon cannot tell."""
    query = urlencode({"prefix": prefix} | ({"where": where} if where else {}), errors="surrogateescape")
    try:
        names = ControlClient(socket, patience=_TIMEOUT).call("GET", f"/v1/names?{query}", None)["names"]
        return [name for name in names if _SAFE.fullmatch(name)]
    except (CommandError, LookupError, TypeError):
        return []

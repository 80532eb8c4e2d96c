"""A persistent secret, so that signatures made with it stay valid after a restart."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_LENGTH = 32


def load_or_create_secret(path: Path) -> bytes:
    """Return the secret stored at `path` (mode 0600), creating it on first use. Raises OSError. Blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(_LENGTH))
    secret = path.read_bytes()
    # A crash may have left a short file. It can be replaced, because nothing was signed with it yet.
    if len(secret) < _LENGTH:
        path.unlink()
        return load_or_create_secret(path)
    return secret

"""A persistent secret, so that signatures made with it stay valid after a restart."""

from __future__ import annotations

import secrets
from pathlib import Path

from dockerproxy.store.files import Staging
from dockerproxy.store.tree_reader import read_small

SECRET_LENGTH = 32


def load_or_create_secret(path: Path, staging: Staging) -> bytes:
    """Return the secret stored at `path`, creating it on first use. Raises OSError. Blocks.

    If several processes create it at the same time, all return the same secret. `staging` is private, and syncs.
    """
    secret = read_small(str(path), SECRET_LENGTH)
    if secret is None:
        staging.write_new(secrets.token_bytes(SECRET_LENGTH), str(path))
    elif len(secret) < SECRET_LENGTH:
        # A power cut has torn the file. It can be replaced, because nothing was signed with it yet.
        staging.write(secrets.token_bytes(SECRET_LENGTH), str(path))
    else:
        return secret
    return load_or_create_secret(path, staging)

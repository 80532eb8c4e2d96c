from __future__ import annotations

import stat
from pathlib import Path

from dockerproxy.store.secret import kept_secret


def test_it_is_kept_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    secret = kept_secret(path)
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert kept_secret(path) == secret
    assert kept_secret(tmp_path / "another") != secret


def test_one_that_a_crash_left_torn_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"")
    secret = kept_secret(path)
    assert len(secret) == 32
    assert kept_secret(path) == secret

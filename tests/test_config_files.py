"""Files that settings name: regular ones of a bounded size, which the daemon never waits for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dockerproxy.config_files import MAX_SIZE, exposure_warning, read_config_file
from dockerproxy.registry.htpasswd import HtpasswdError, HtpasswdFile
from dockerproxy.reload import Configuration
from dockerproxy.settings import SettingsError, read_env_file
from dockerproxy.upstream.tls import ClientContext


def test_a_link_is_followed(tmp_path: Path) -> None:
    """Kubernetes puts secrets there by links."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    content, status = read_config_file(tmp_path / "link")
    assert (content, status.st_size) == (b"content", 7)


@pytest.mark.parametrize("kind", ["FIFO", "device", "directory", "large"])
def test_nothing_else_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, MAX_SIZE + 1)
    with pytest.raises(SettingsError, match=f"{path} cannot be read: "):
        read_env_file(path)
    with pytest.raises(HtpasswdError, match=f"{path} cannot be read: "):
        HtpasswdFile(StoppedClock(), None, path, b"")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"UPSTREAM_CA_FILE '{path}' (cannot be read: |contains no certificates)"):
        ClientContext(ca_file=str(path))


class StoppedClock:
    """A clock that stands still."""

    def seconds(self) -> float:
        return 0.0


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660, 0o750])
def test_a_private_file_needs_no_warning(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "htpasswd"
    path.touch()
    path.chmod(mode)
    assert exposure_warning("which has hashes", path) is None
    assert exposure_warning("which has hashes", tmp_path / "none") is None


def test_secrets_that_every_local_user_can_read_are_named(tmp_path: Path) -> None:
    htpasswd, env_file = tmp_path / "htpasswd", tmp_path / ".env"
    htpasswd.touch()
    env_file.write_text(f"HTPASSWD_FILE={htpasswd}\nREGISTRIES=quay.io\nAUTH_REGISTRIES=quay.io:user:password\n")
    for path in (htpasswd, env_file):
        path.chmod(0o644)
    assert Configuration.read({}, str(env_file)).settings.warnings == (
        f"every local user can read {htpasswd}, which HTPASSWD_FILE names (mode 0644); run: chmod o= {htpasswd}",
        f"every local user can read {env_file}, which has passwords (mode 0644); run: chmod o= {env_file}",
    )
    for path in (htpasswd, env_file):
        path.chmod(0o640)
    assert Configuration.read({}, str(env_file)).settings.warnings == ()


@pytest.mark.parametrize("line", ["CA_KEY_PASSPHRASE=x", "UPSTREAM_PROXY=http://user:password@proxy.test:3128"])
def test_an_env_file_with_any_password_is_named(tmp_path: Path, line: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text(line)
    env_file.chmod(0o644)
    [warning] = Configuration.read({}, str(env_file)).settings.warnings
    assert str(env_file) in warning and "password@" not in warning


@pytest.mark.parametrize("prefix", ["REGISTRY", "PROXY"])
def test_a_key_that_every_local_user_can_read_is_named(tmp_path: Path, prefix: str) -> None:
    key = tmp_path / "key.pem"
    key.touch()
    key.chmod(0o644)
    variables = {f"{prefix}_CRT_FILE": str(tmp_path / "crt.pem"), f"{prefix}_KEY_FILE": str(key)}
    [warning] = Configuration.read(variables, None).settings.warnings
    assert f"{key}, which {prefix}_KEY_FILE names" in warning


def test_a_file_without_secrets_may_be_public(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKERS=1\n")
    (tmp_path / ".env").chmod(0o644)
    assert Configuration.read({}, str(tmp_path / ".env")).settings.warnings == ()

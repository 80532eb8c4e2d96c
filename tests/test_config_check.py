"""The check of a file with settings before a reload: whatever would stop the daemon is found, and nothing else."""

from __future__ import annotations

from pathlib import Path

import bcrypt
import pytest

from dockerproxy.config_check import check_env_file


def check(tmp_path: Path, content: str) -> tuple[str | None, list[str]]:
    path = tmp_path / "environment"
    path.write_text(content)
    path.chmod(0o600)
    refused, warnings = check_env_file(str(path))
    return refused, list(warnings)


def test_a_usable_file(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.write_text(f"me:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    users.chmod(0o600)
    assert check(tmp_path, f"REGISTRIES=quay.io\nHTPASSWD_FILE={users}\n") == (None, [])


def test_warnings_do_not_refuse(tmp_path: Path) -> None:
    refused, [warning] = check(tmp_path, "REGISTRIE=quay.io\n")
    assert refused is None
    assert warning == "REGISTRIE is not a setting and has no effect. Did you mean REGISTRIES?"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("CACHE_MAX_SIZE=lots\n", "CACHE_MAX_SIZE: 'lots' is not a size"),
        ("just text\n", ", line 1, is not NAME=value."),
        ("HTPASSWD_FILE={}/missing\n", "HTPASSWD_FILE: {}/missing cannot be read: No such file or directory."),
        ("PROXY_HTPASSWD_FILE={}/plain\n", "PROXY_HTPASSWD_FILE: {}/plain, line 1 has no bcrypt hash"),
        ("REGISTRY_CRT_FILE={}/plain\nREGISTRY_KEY_FILE={}/plain\n", "REGISTRY_CRT_FILE"),
        ("PROXY_CRT_FILE={}/plain\n", "PROXY_CRT_FILE is set and PROXY_KEY_FILE is not"),
        ("UPSTREAM_CA_FILE={}/plain\n", "UPSTREAM_CA_FILE"),
        ("DOCKER_CONFIG_FILE={}/plain\n", "DOCKER_CONFIG_FILE: {}/plain is not JSON"),
    ],
)
def test_a_file_that_would_stop_the_daemon(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "plain").write_text("me:plain\n")
    refused, _ = check(tmp_path, content.replace("{}", str(tmp_path)))
    assert refused is not None and reason.replace("{}", str(tmp_path)) in refused
    assert refused.endswith(".") and "\n" not in refused


@pytest.mark.parametrize("name", ["missing", ""])
def test_an_unreadable_file(tmp_path: Path, name: str) -> None:
    assert "cannot be read" in str(check_env_file(str(tmp_path / name))[0])

"""The check of a file with settings before a reload: whatever would stop the daemon is found, and nothing else."""

from __future__ import annotations

from pathlib import Path

import bcrypt
import pytest
from attrs import fields

from dockerproxy.config_check import check_env_file
from dockerproxy.settings import Settings
from tests.test_settings import INVALID

FILE_SETTINGS = [
    attribute.name.upper()
    for attribute in fields(Settings)
    if attribute.name.endswith("_file") and not attribute.name.endswith(("_crt_file", "_key_file"))
]


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
        ("CA_CRT_FILE={}/missing\nCA_KEY_FILE={}/missing\n", "CA_CRT_FILE: {}/missing"),
        ("CA_CRT_FILE={}/plain\nCA_KEY_FILE={}/plain\n", "CA_CRT_FILE: {}/plain"),
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


def test_each_setting_that_is_wrong_is_one_sentence_with_its_name(tmp_path: Path) -> None:
    for name, text, _ in INVALID:
        if text.isprintable() and "'" not in text:
            refused, _ = check(tmp_path, f"REGISTRIES=quay.io\n{name}='{text}'\n")
            assert refused is not None and refused.startswith(name), name
            assert refused.endswith(".") and "\n" not in refused and len(refused) < 400


def test_each_file_that_is_missing_is_one_sentence_with_its_setting(tmp_path: Path) -> None:
    """One that stops no start is a warning."""
    contents = {name: f"{name}={tmp_path}/missing\n" for name in FILE_SETTINGS}
    contents |= {
        f"{pair}_CRT_FILE": f"{pair}_CRT_FILE={tmp_path}/missing\n{pair}_KEY_FILE={tmp_path}/missing\n"
        for pair in ("CA", "REGISTRY", "PROXY")
    }
    for name, content in contents.items():
        refused, warnings = check(tmp_path, content)
        sentences = [refused] if refused is not None else warnings
        assert len(sentences) == 1, name
        assert sentences[0].startswith(name) and f"{tmp_path}/missing" in sentences[0]


def test_wrong_lines_of_the_pin_file_are_warnings(tmp_path: Path) -> None:
    pins = tmp_path / "pins"
    pins.write_text("nginx:1\nNGINX\nx y z\n")
    refused, warnings = check(tmp_path, f"PIN_FILE={pins}\n")
    assert refused is None
    assert [warning.partition(":")[2].partition(":")[0] for warning in warnings] == [
        f" {pins}, line 2", f" {pins}, line 3",
    ]  # fmt: skip

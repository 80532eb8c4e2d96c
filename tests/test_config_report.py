"""The settings in force: their values, their sources, and no secret of any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attrs import fields

from dockerproxy.config_report import ConfigReport
from dockerproxy.reload import Configuration
from dockerproxy.settings import Settings, variable_name

ENV_FILE = """\
# a comment
REGISTRIES=quay.io ghcr.io
export CACHE_MAX_SIZE="2g"  # of the disk
AUTH_REGISTRIES=quay.io:robot+x:hunter2 ghcr.io:me:hunter2
TUNNEL_PORTS=
UPSTREAM_PROXY=http://me:hunter2@proxy.example:3128
"""


def read(tmp_path: Path, content: str = ENV_FILE, **environment: str) -> Configuration:
    path = tmp_path / "environment"
    path.write_text(content)
    path.chmod(0o600)
    return Configuration.read(environment, str(path))


def rows(initial: Configuration, current: Configuration | None = None) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in ConfigReport(initial, current or initial).rows()}


def source(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["value"], row["source"], row["place"]


def test_each_source_is_named(tmp_path: Path) -> None:
    credential = tmp_path / "docker-registry-proxy.docker_config_file"
    credential.write_text("{}")
    found = rows(
        read(tmp_path, CACHE_INACTIVE="30d", CREDENTIALS_DIRECTORY=str(tmp_path), STATE_DIRECTORY="/var/lib/proxy")
    )
    path = tmp_path / "environment"
    assert source(found["REGISTRIES"]) == ("quay.io ghcr.io", "file", f"{path}, line 2")
    assert source(found["CACHE_MAX_SIZE"]) == ("2g", "file", f"{path}, line 3")
    assert source(found["CACHE_INACTIVE"]) == ("30d", "environment", "CACHE_INACTIVE")
    assert source(found["DOCKER_CONFIG_FILE"]) == (str(credential), "credential", credential.name)
    assert source(found["TUNNEL_PORTS"]) == ("443", "default", ""), "an empty variable counts as unset"
    assert source(found["HTPASSWD_FILE"]) == ("", "default", "")
    assert source(found["STATE_DIR"]) == ("/var/lib/proxy", "environment", "STATE_DIRECTORY")
    assert source(found["CACHE_DIR"]) == ("/var/lib/proxy/cache", "default", "")


def test_the_environment_takes_precedence(tmp_path: Path) -> None:
    found = rows(read(tmp_path, CACHE_MAX_SIZE="1g", REGISTRIES=""))
    assert source(found["CACHE_MAX_SIZE"]) == ("1g", "environment", "CACHE_MAX_SIZE")
    assert source(found["REGISTRIES"]) == ("", "default", "")


def test_a_proxy_of_the_environment(tmp_path: Path) -> None:
    found = rows(read(tmp_path, "", https_proxy="http://me:hunter2@proxy.example:3128"))
    assert source(found["UPSTREAM_PROXY"]) == ("http://***@proxy.example:3128", "environment", "https_proxy")


def test_each_setting_has_one_row(tmp_path: Path) -> None:
    names = [variable_name(attribute.name) for attribute in fields(Settings) if attribute.name != "warnings"]
    found = ConfigReport(*[read(tmp_path)] * 2).rows()
    assert [row["name"] for row in found] == list(dict.fromkeys(names))
    json.dumps(found)


SECRET = "hunter2"
SECRETS = {
    "AUTH_REGISTRIES": [f"quay.io:me:{SECRET}", f"quay.io:{SECRET}:pw", f"auth.docker.io:me:{SECRET}@x"],
    "CA_KEY_PASSPHRASE": [SECRET, f"//{SECRET}"],
    "UPSTREAM_PROXY": [f"http://me:{SECRET}@proxy:1", f"http://{SECRET}@proxy:1", f"http://a:b{SECRET}%40@proxy:1"],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in SECRETS.items() for text in texts], ids=lambda value: value
)
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "environment"])
def test_no_secret_is_shown(tmp_path: Path, name: str, text: str, in_file: bool) -> None:
    configuration = read(tmp_path, f"{name}={text}\n") if in_file else read(tmp_path, "", **{name: text})
    found = ConfigReport(configuration, configuration).rows()
    assert SECRET not in json.dumps(found)
    assert "***" in rows(configuration)[name]["value"]


def test_what_repr_hides_is_hidden_here(tmp_path: Path) -> None:
    hidden = [attribute.name.upper() for attribute in fields(Settings) if attribute.repr is False]
    assert "CA_KEY_PASSPHRASE" in hidden
    found = rows(read(tmp_path, "".join(f"{name}={SECRET}\n" for name in hidden)))
    assert {found[name]["value"] for name in hidden} == {"***"}


def test_a_reload_changes_the_reloadable_settings_only(tmp_path: Path) -> None:
    initial = read(tmp_path, "REGISTRIES=quay.io\nCACHE_MAX_SIZE=1g\n")
    current = read(tmp_path, "CACHE_MAX_SIZE=2g\n\nREGISTRIES=ghcr.io\n")
    found = rows(initial, current)
    path = tmp_path / "environment"
    assert source(found["REGISTRIES"]) == ("ghcr.io", "file", f"{path}, line 3")
    assert (found["REGISTRIES"]["reload"], found["REGISTRIES"]["pending"]) == (True, None)
    assert source(found["CACHE_MAX_SIZE"]) == ("1g", "file", f"{path}, line 2")
    assert (found["CACHE_MAX_SIZE"]["reload"], found["CACHE_MAX_SIZE"]["pending"]) == (False, "2g")
    assert found["WORKERS"]["pending"] is None

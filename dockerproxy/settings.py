"""Settings of the daemon, parsed from environment variables and a .env file. `dockerproxy.parsers` checks values."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from attrs import Attribute, field, fields, frozen

from dockerproxy import parsers
from dockerproxy.config_files import exposure_warning, read_config_file
from dockerproxy.net.addresses import AddressSet, Destinations, HostPattern
from dockerproxy.net.store_location import StoreLocation
from dockerproxy.net.upstream_proxy import UpstreamProxy
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.docker_hub import DOCKER_HUB, DOCKER_HUB_ALIASES, DOCKER_HUB_TOKENS
from dockerproxy.oci.host_table import HostKey, RegistryWildcard
from dockerproxy.oci.names import Host, Registry

_DOCKER_HUB_NAMES = (DOCKER_HUB, DOCKER_HUB_TOKENS, *DOCKER_HUB_ALIASES)

_PARSER = "dockerproxy"  # the attrs metadata key of a setting's (parser, default as text)


class SettingsError(Exception):
    """A setting is invalid. The message is one sentence with the variable, its value and the expected format.

    The message omits a value that is, or may contain, a password.
    """


def _setting(parse: Callable[[str], Any], default: str | None = None, **options: Any) -> Any:
    return field(metadata={_PARSER: (parse, default)}, **options)


def _derived(**options: Any) -> Any:
    """Declare an attribute that is derived from several variables."""
    return field(metadata={_PARSER: None}, **options)


@frozen(kw_only=True)
class Settings:
    """The administrator's settings. Durations are in seconds, sizes in bytes. None or empty means not set.

    Each attribute has the name of its variable in lower case. The exceptions are parts of REGISTRIES: in
    `registry_wildcards` its wildcards, and in `extra_registries` the others without Docker Hub. docs/settings.md
    describes each setting.
    """

    extra_registries: tuple[Registry, ...] = _derived()
    registry_wildcards: tuple[RegistryWildcard, ...] = _derived()
    auth_registries: Mapping[HostKey, BasicCredentials] = _derived()
    auth_registries_delimiter: str = _setting(str, " ")
    auth_registry_delimiter: str = _setting(str, ":")
    credential_helpers: Mapping[HostKey, str] = _setting(parsers.credential_helpers, "")
    docker_config_file: Path | None = _setting(parsers.path)
    allow_push: bool = _setting(parsers.boolean, "false")
    cache_max_size: int = _setting(parsers.size, "32g")
    cache_max_blob_size: int | None = _setting(parsers.size)
    cache_inactive: float = _setting(parsers.positive_duration, "60d")
    rate_reserve: int = _setting(parsers.percentage, "20%")
    pin_file: Path | None = _setting(parsers.path)
    enable_manifest_cache: bool = _setting(parsers.boolean, "false")
    manifest_cache_primary_regex: re.Pattern[str] = _setting(parsers.regex, "(stable|nightly|production|test)")
    manifest_cache_primary_time: float = _setting(parsers.duration, "10m")
    manifest_cache_secondary_regex: re.Pattern[str] = _setting(parsers.regex, r"(.*)(\d|\.)+(.*)(\d|\.)+(.*)(\d|\.)+")
    manifest_cache_secondary_time: float = _setting(parsers.duration, "60d")
    manifest_cache_default_time: float = _setting(parsers.duration, "1h")
    verify_ssl: bool = _setting(parsers.boolean, "true")
    disable_ipv6: bool = _setting(parsers.boolean, "false")
    ca_crt_file: Path | None = _setting(parsers.path)
    ca_key_file: Path | None = _setting(parsers.path)
    ca_key_passphrase: str | None = _setting(str, repr=False)
    registry_crt_file: Path | None = _setting(parsers.path)
    registry_key_file: Path | None = _setting(parsers.path)
    proxy_crt_file: Path | None = _setting(parsers.path)
    proxy_key_file: Path | None = _setting(parsers.path)
    keepalive_timeout: float = _setting(parsers.duration, "300s")
    client_header_timeout: float = _setting(parsers.positive_duration, "60s")
    client_body_timeout: float = _setting(parsers.positive_duration, "60s")
    send_timeout: float = _setting(parsers.positive_duration, "60s")
    client_min_rate: int = _setting(parsers.size_or_zero, "500")
    proxy_connect_timeout: float = _setting(parsers.positive_duration, "60s")
    proxy_read_timeout: float = _setting(parsers.positive_duration, "60s")
    proxy_send_timeout: float = _setting(parsers.positive_duration, "60s")
    proxy_connect_connect_timeout: float = _setting(parsers.positive_duration, "60s")
    proxy_connect_read_timeout: float = _setting(parsers.positive_duration, "60s")
    proxy_connect_send_timeout: float = _setting(parsers.positive_duration, "60s")
    proxy_request_buffering: bool = _setting(parsers.boolean, "false")

    state_dir: Path = _derived()
    cache_dir: Path = _derived()
    registry_dir: Path = _derived()
    ca_dir: Path = _derived()
    runtime_dir: Path = _derived()
    proxy_listen: tuple[str, ...] = _setting(parsers.endpoints, "tcp:3128")
    proxy_tls_listen: tuple[str, ...] = _setting(parsers.optional_endpoints, "none")
    registry_listen: tuple[str, ...] = _setting(parsers.optional_endpoints, "tcp:5443")
    registry_http_listen: tuple[str, ...] = _setting(parsers.optional_endpoints, "none")
    registry_hostname: tuple[str, ...] = _setting(parsers.host_names, "docker-registry.local")
    registry_url: Registry | None = _setting(parsers.registry_url)
    trusted_proxies: AddressSet = _setting(parsers.trusted_proxies, "none")
    upstream_addresses: Mapping[Host, Host] = _setting(parsers.addresses, "")
    upstream_ca_file: Path | None = _setting(parsers.path)
    upstream_proxy: UpstreamProxy | None = _derived()
    fleet: tuple[Host, ...] = _setting(parsers.fleet, "")
    fleet_address: Host | None = _setting(parsers.fleet_address)
    fleet_fan_out: int = _setting(parsers.integer(1, 1000), "8")
    fleet_timeout: float = _setting(parsers.positive_duration, "5s")
    allow_clients: AddressSet = _setting(AddressSet.parse, "private loopback link-local")
    max_connections_per_client: int | None = _setting(parsers.integer(1, 1_000_000))
    allowed_hosts: tuple[HostPattern, ...] | None = _setting(parsers.allowed_hosts, "")
    cors_origins: tuple[str, ...] = _setting(parsers.origins, "")
    page: str = _setting(parsers.one_of("public", "users", "admin", "off"), "public")
    admin_users: frozenset[str] = _setting(parsers.user_names, "")
    proxy_htpasswd_file: Path | None = _setting(parsers.path)
    tunnel_ports: frozenset[int] = _setting(parsers.ports, "443")
    tunnel_allow: Destinations = _setting(Destinations.parse, "all")
    tunnel_deny: Destinations = _setting(Destinations.parse, "loopback link-local metadata")
    share_auth_registries: bool = _setting(parsers.boolean, "true")
    htpasswd_file: Path | None = _setting(parsers.path)
    max_uploads: int = _setting(parsers.integer(1, 1_000_000), "10000")
    max_uploads_per_client: int = _setting(parsers.integer(1, 1_000_000), "3000")
    anonymous_pull: bool = _setting(parsers.boolean, "false")
    registry_store: StoreLocation | None = _setting(parsers.registry_store, "none")
    registry_read_only: bool = _setting(parsers.boolean, "false")
    allow_delete: bool = _setting(parsers.boolean, "true")
    allow_sparse_indexes: bool = _setting(parsers.boolean, "false")
    workers: int = _derived()
    pull_history: float = _setting(parsers.history, "30d")
    log_format: str = _setting(parsers.one_of("text", "json"), "text")

    warnings: tuple[str, ...] = _derived()
    """Sentences about variables that have no effect, such as misspelt ones."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str], file: Mapping[str, str] = MappingProxyType({})) -> Settings:
        """Parse the settings from `env`, which takes precedence over `file` (see `read_env_file`).

        An empty variable counts as unset. If AUTH_REGISTRIES is unset in both, it is read from a systemd credential.
        Raise `SettingsError` for the first invalid value.
        """
        environment = _Environment({**file, **with_credentials(env, file)})
        attributes = {
            attribute.name: environment.setting(attribute)
            for attribute in fields(cls)
            if attribute.metadata[_PARSER] is not None
        }
        attributes |= _upstreams(
            environment, attributes["auth_registries_delimiter"], attributes["auth_registry_delimiter"]
        )
        attributes |= _directories(environment)
        attributes["workers"] = environment.read("WORKERS", parsers.integer(1, 64), str(_default_workers()))
        attributes["warnings"] = (
            *_typo_warnings(file, _variable_names(cls)),
            *_override_warnings(env, file, _variable_names(cls)),
        )
        if attributes["fleet_address"] is not None and not attributes["fleet"]:
            raise SettingsError("FLEET_ADDRESS is set and FLEET is not; FLEET has the addresses of all members.")
        if attributes["fleet"] and attributes["proxy_htpasswd_file"] is not None:
            raise SettingsError(
                "FLEET and PROXY_HTPASSWD_FILE are set, but members have no login for each other's proxy; unset one."
            )
        for prefix in ("CA", "REGISTRY", "PROXY"):
            pair = [f"{prefix}_CRT_FILE", f"{prefix}_KEY_FILE"]
            is_set = [attributes[name.lower()] is not None for name in pair]
            if any(is_set) and not all(is_set):
                present, missing = pair if is_set[0] else reversed(pair)
                raise SettingsError(
                    f"{present} is set and {missing} is not; set both {' and '.join(pair)}, or neither."
                )
        return cls(**attributes)

    @property
    def max_blob_size(self) -> int:
        """The bytes that one blob may take of the cache: CACHE_MAX_BLOB_SIZE, or three quarters of the cache."""
        default = self.cache_max_size - self.cache_max_size // 4
        return default if self.cache_max_blob_size is None else min(self.cache_max_blob_size, self.cache_max_size)

    @property
    def registries(self) -> tuple[Registry, ...]:
        """The cached registries: Docker Hub first, then those of REGISTRIES."""
        return (DOCKER_HUB, *self.extra_registries)

    @property
    def intercepted(self) -> tuple[Registry, ...]:
        """The hosts to intercept: the cached registries, and the token server and other names of Docker Hub."""
        return (*self.registries, DOCKER_HUB_TOKENS, *DOCKER_HUB_ALIASES)


class _Environment:
    """Environment variables, parsed with errors that name the variable."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def text(self, name: str) -> str:
        """Return the text of the variable, or `""` if it is not set."""
        return self._variables.get(name, "")

    def setting(self, attribute: Attribute[Any]) -> Any:
        """Parse the setting that `attribute` declares."""
        parse, default = attribute.metadata[_PARSER]
        return self.read(attribute.name.upper(), parse, default)

    def read(self, names: str | tuple[str, ...], parse: Callable[[str], Any], default: str | None) -> Any:
        """Parse the first of `names` that is set, or else `default`. Return None if that is None."""
        for name in (names,) if isinstance(names, str) else names:
            # Keep the spaces of a text setting, because a delimiter may consist of spaces. Strip all other values.
            text = self.text(name) if parse is str else self.text(name).strip()
            if text:
                return self._parse(name, parse, text)
        return None if default is None else parse(default)

    @staticmethod
    def _parse(name: str, parse: Callable[[str], Any], text: str) -> Any:
        try:
            text.encode()
            return parse(text)
        except UnicodeEncodeError:  # os.environ has lone surrogates in place of bytes that are not UTF-8
            raise SettingsError(f"{name} is not UTF-8 text.") from None
        except ValueError as error:
            raise SettingsError(f"{name}: {error}.") from None


def with_credentials(env: Mapping[str, str], file: Mapping[str, str]) -> Mapping[str, str]:
    """Return `env` with AUTH_REGISTRIES and DOCKER_CONFIG_FILE from systemd credentials if `env` and `file` lack them.

    Raise `SettingsError`.
    """
    variables = {**file, **env}
    if not variables.get("AUTH_REGISTRIES", "").strip():
        env = {**env, **_systemd_credential(env, "AUTH_REGISTRIES")}
    if not variables.get("DOCKER_CONFIG_FILE", "").strip():
        env = {**env, **_systemd_credential_path(env, "DOCKER_CONFIG_FILE")}
    return env


def credential_name(name: str) -> str:
    """Return the name of the systemd credential with the variable `name`."""
    return f"docker-registry-proxy.{name.lower()}"


def _systemd_credential_path(env: Mapping[str, str], name: str) -> dict[str, str]:
    """Return `name` with the path of the systemd credential docker-registry-proxy.NAME, if there is one."""
    directory = env.get("CREDENTIALS_DIRECTORY", "")
    path = Path(directory) / credential_name(name)
    return {name: str(path)} if directory and path.exists() else {}


def _systemd_credential(env: Mapping[str, str], name: str) -> dict[str, str]:
    """Read the variable `name` from the systemd credential docker-registry-proxy.NAME, with NAME in lower case."""
    directory = env.get("CREDENTIALS_DIRECTORY", "")
    path = Path(directory) / credential_name(name)
    try:
        return {name: read_config_file(path)[0].decode("utf-8")} if directory else {}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text.") from None


def _upstreams(environment: _Environment, entry_delimiter: str, field_delimiter: str) -> dict[str, Any]:
    registries = environment.read("REGISTRIES", parsers.registries, "")
    no_proxy = environment.text("NO_PROXY") or environment.text("no_proxy")
    wildcards = tuple(entry for entry in registries if isinstance(entry, RegistryWildcard))
    listed = tuple(entry for entry in registries if isinstance(entry, Registry))
    known_hosts = [registry.host for registry in (*_DOCKER_HUB_NAMES, *listed)] + [entry.hosts for entry in wildcards]
    return {
        "extra_registries": tuple(registry for registry in listed if registry not in _DOCKER_HUB_NAMES),
        "registry_wildcards": wildcards,
        "auth_registries": environment.read(
            "AUTH_REGISTRIES", lambda text: parsers.logins(text, entry_delimiter, field_delimiter, known_hosts), ""
        ),
        "upstream_proxy": environment.read(
            ("UPSTREAM_PROXY", "HTTPS_PROXY", "https_proxy"),
            lambda text: parsers.upstream_proxy(text, no_proxy),
            "none",
        ),
    }


def _directories(environment: _Environment) -> dict[str, Any]:
    # systemd separates several directories by colons. Use the first one.
    default_state_dir = environment.text("STATE_DIRECTORY").partition(":")[0] or "var"
    directories: dict[str, Any] = {"state_dir": environment.read("STATE_DIR", parsers.path, default_state_dir)}
    for name in ("cache", "registry", "ca"):
        directories[f"{name}_dir"] = environment.read(
            f"{name.upper()}_DIR", parsers.path, str(directories["state_dir"] / name)
        )
    default_runtime_dir = environment.text("RUNTIME_DIRECTORY").partition(":")[0] or str(
        directories["state_dir"] / "run"
    )
    directories["runtime_dir"] = environment.read("RUNTIME_DIR", parsers.path, default_runtime_dir)
    return directories


def _default_workers() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _variable_names(settings: type[Settings]) -> list[str]:
    attributes = [attribute.name for attribute in fields(settings) if attribute.name != "warnings"]
    return list(dict.fromkeys(map(variable_name, attributes)))


def variable_name(attribute: str) -> str:
    """Return the name of the variable that `attribute` of `Settings` is parsed from."""
    return "REGISTRIES" if attribute in ("extra_registries", "registry_wildcards") else attribute.upper()


def default_text(attribute: Attribute[Any]) -> str | None:
    """Return the default of the setting that `attribute` declares, as text; None if it has none or is derived."""
    declaration = attribute.metadata[_PARSER]
    return None if declaration is None else declaration[1]


# Variables of other programs that resemble a setting. A warning about them would be wrong.
_UNRELATED_VARIABLES = set(
    "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY STATE_DIRECTORY RUNTIME_DIRECTORY DEBUG DEBUG_HUB DEBUG_NGINX".split()
)


def _typo_warnings(file: Mapping[str, str], setting_names: list[str]) -> list[str]:
    warnings = []
    for name in file:
        upper = name.upper()
        if name in setting_names or upper in _UNRELATED_VARIABLES:
            continue
        candidates = (
            [upper] if upper in setting_names else difflib.get_close_matches(upper, setting_names, n=3, cutoff=0.77)
        )
        if candidates:
            warnings.append(f"{name} is not a setting and has no effect. Did you mean {' or '.join(candidates)}?")
    return warnings


def unread_names(file: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names in an environment file that are no settings, nor resemble one: `Settings.warnings` names those.

    Variables that other programs read from such a file are left out, and those of botocore, which REGISTRY_STORE uses.
    """
    setting_names = _variable_names(Settings)
    known = {*setting_names, *_UNRELATED_VARIABLES}
    names = [
        name for name in file if name not in setting_names and name.upper() not in known and not name.startswith("AWS_")
    ]
    return tuple(name for name in names if not _typo_warnings({name: ""}, setting_names))


def _override_warnings(env: Mapping[str, str], file: Mapping[str, str], setting_names: list[str]) -> list[str]:
    return [
        f"{name} in the .env file has no effect, because the environment sets it to another value."
        for name in setting_names
        if name in file and env.get(name, file[name]) != file[name]
    ]


_SECRETS = ("AUTH_REGISTRIES", "CA_KEY_PASSPHRASE")
_PROXIES = ("UPSTREAM_PROXY", "HTTPS_PROXY", "https_proxy")
# Files of hashes and keys. The CA's key has a warning of its own.
_SECRET_FILES = ("docker_config_file", "htpasswd_file", "proxy_htpasswd_file", "registry_key_file", "proxy_key_file")


def exposure_warnings(settings: Settings, env_file: str | None, variables: Mapping[str, str]) -> tuple[str, ...]:
    """Return sentences about files with secrets that every local user can read. `variables` are those of `env_file`."""
    paths = {
        Path(path): f"which {name.upper()} names"
        for name in _SECRET_FILES
        if (path := getattr(settings, name)) is not None
    }
    has_secret = any(variables.get(name) for name in _SECRETS) or any(
        "@" in variables.get(name, "") for name in _PROXIES
    )
    if env_file is not None and has_secret:
        paths[Path(env_file)] = "which has passwords"
    warnings = (exposure_warning(description, path) for path, description in paths.items())
    return tuple(warning for warning in warnings if warning is not None)


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_COMMENT = re.compile(r"\s+#.*")
_QUOTED = re.compile(r"(['\"])(.*?)\1(?:\s+#.*)?")


class EnvFile(dict[str, str]):
    """The variables of a ``.env`` file. `lines` has the number of the line of each."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


def read_env_file(path: str | Path) -> EnvFile:
    """Read the variables of a ``.env`` file as docker-compose does, but without expansion.

    A line is ``NAME=value``, optionally after ``export``. The value ends at the end of the line, or at a ``#`` after a
    space. One pair of quotes around it is removed; a ``#`` between quotes is kept. The last line of a name counts.
    Raise `SettingsError` if the file cannot be read or a line is malformed. The message omits the text of the line,
    because that may be a password.
    """
    try:
        text = read_config_file(path)[0].decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text.") from None
    variables = EnvFile()
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        name = re.sub(r"^export\s+", "", name).strip()
        if not equals or not _NAME.fullmatch(name):
            raise SettingsError(f"{path}, line {number}, is not NAME=value.")
        variables[name] = _unquote(value.strip())
        variables.lines[name] = number
    return variables


def _unquote(value: str) -> str:
    match = _QUOTED.fullmatch(value)
    if match:
        return match[2]
    return "" if value.startswith("#") else _COMMENT.sub("", value, count=1)

"""Reload on SIGHUP: read the settings again and apply those that may change in a running daemon.

These are REGISTRIES, AUTH_REGISTRIES with its delimiters, CREDENTIAL_HELPERS, DOCKER_CONFIG_FILE, PROXY_HTPASSWD_FILE,
HTPASSWD_FILE, ANONYMOUS_PULL, REGISTRY_READ_ONLY, ALLOW_DELETE, ALLOW_SPARSE_INDEXES, ALLOWED_HOSTS, CORS_ORIGINS,
PAGE, ADMIN_USERS, REGISTRY_URL, RATE_RESERVE, PIN_FILE, and FLEET if it was set at the start. The code that uses them
holds a mapping or an object that is modified in place, so a reload closes no connection and interrupts no transfer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path

from attrs import define, evolve, field, fields, frozen
from twisted.internet.defer import DeferredLock
from twisted.logger import Logger

from dockerproxy.concurrency import spawn
from dockerproxy.config_files import read_config_file
from dockerproxy.daemon.systemd import Notifier
from dockerproxy.oci.docker_hub import DOCKER_HUB, DOCKER_HUB_ALIASES
from dockerproxy.oci.host_table import RegistryMap, Wildcard
from dockerproxy.oci.names import Host, Registry
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.htpasswd import HtpasswdError
from dockerproxy.registry.principal import Principal
from dockerproxy.settings import (
    EnvFile,
    Settings,
    SettingsError,
    credential_name,
    exposure_warnings,
    read_env_file,
    unread_names,
    variable_name,
    with_credentials,
)
from dockerproxy.upstream.credential_helper import PROGRAM_PREFIX, helper_environment, helper_program
from dockerproxy.upstream.credentials import login_warnings
from dockerproxy.upstream.docker_config import DockerConfig

RELOADABLE = {
    "extra_registries",
    "fleet",
    "registry_wildcards",
    "auth_registries",
    "auth_registries_delimiter",
    "auth_registry_delimiter",
    "credential_helpers",
    "docker_config_file",
    "proxy_htpasswd_file",
    "htpasswd_file",
    "anonymous_pull",
    "registry_read_only",
    "allow_delete",
    "allow_sparse_indexes",
    "allowed_hosts",
    "registry_url",
    "cors_origins",
    "rate_reserve",
    "pin_file",
    "page",
    "admin_users",
    "warnings",
}
"""The attributes of `Settings` that a reload applies."""

_SIGNAL = Principal(None, "SIGHUP", None)

log = Logger()


@frozen
class Configuration:
    """The settings, and the variables that they were parsed from. Other processes parse the same variables.

    `docker_config` is the content of DOCKER_CONFIG_FILE, which is empty if that is not set. `unread` are the names in
    the environment file that nothing reads.
    """

    settings: Settings
    variables: Mapping[str, str] = field(repr=False)
    docker_config: DockerConfig = field(factory=DockerConfig, repr=False)
    sources: Mapping[str, tuple[str, str]] = field(factory=dict)
    """The source of each variable that is not simply one of the environment: its kind, and the place in it."""
    unread: tuple[str, ...] = ()

    @classmethod
    def read(cls, environment: Mapping[str, str], env_file: str | None) -> Configuration:
        """Read `env_file` and the credentials of systemd once. The environment takes precedence over `env_file`.

        Raise `SettingsError`.
        """
        file = read_env_file(env_file) if env_file else EnvFile()
        sources = {name: ("file", f"{env_file}, line {file.lines[name]}") for name in file if name not in environment}
        with_files = with_credentials(environment, file)
        sources |= {
            name: ("credential", credential_name(name))
            for name in with_files
            if with_files[name] != environment.get(name)
        }
        environment = with_files
        settings = Settings.from_environment(environment, file)
        docker_config = read_docker_config(settings.docker_config_file)
        variables = {**file, **environment}
        warnings = (
            *settings.warnings,
            *(f"DOCKER_CONFIG_FILE: {warning}." for warning in docker_config.warnings),
            *helper_warnings(settings, docker_config, variables),
            *exposure_warnings(settings, env_file, file),
            *login_warnings(settings.auth_registries, settings.registries, settings.registry_wildcards),
        )
        return cls(evolve(settings, warnings=warnings), variables, docker_config, sources, unread_names(file))


def read_docker_config(path: Path | None) -> DockerConfig:
    """Return the content of DOCKER_CONFIG_FILE. Raise `SettingsError`."""
    if path is None:
        return DockerConfig()
    try:
        return DockerConfig.parse(read_config_file(path)[0])
    except OSError as error:
        raise SettingsError(f"DOCKER_CONFIG_FILE: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SettingsError(f"DOCKER_CONFIG_FILE: {path} {error}.") from None


def helper_warnings(settings: Settings, config: DockerConfig, variables: Mapping[str, str]) -> list[str]:
    """Return sentences about credential helpers that cannot be run, and about those that are never asked."""
    environment = helper_environment(variables)
    sources = [(name, "CREDENTIAL_HELPERS") for name in settings.credential_helpers.values()]
    names = [*config.helpers.values(), *filter(None, [config.default_helper])]
    sources += [(name, "DOCKER_CONFIG_FILE") for name in names]
    warnings = [
        f"{setting}: there is no program {PROGRAM_PREFIX}{name} in PATH ({environment.get('PATH', '')}) that the"
        " daemon can execute; its registries are used without a login."
        for name, setting in dict.fromkeys(sources)
        if helper_program(name, environment) is None
    ]
    registries = RegistryTable(settings).intercepted
    wildcards = {wildcard.hosts for wildcard in settings.registry_wildcards}
    for key in settings.credential_helpers:
        is_served = key in registries if isinstance(key, Host) else key in wildcards or _covers_any(key, registries)
        if not is_served:
            warnings.append(
                f"CREDENTIAL_HELPERS: the helper for {key} is never asked, because that is neither Docker Hub nor in"
                " REGISTRIES."
            )
    return warnings


def _covers_any(wildcard: Wildcard, hosts: Iterable[Host]) -> bool:
    return any(Wildcard.above(host) == wildcard for host in hosts)


def reloadable_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that a reload applies. The value is empty if a variable is not set."""
    attributes = RELOADABLE - {"warnings"}
    return {name: variables.get(name, "") for name in map(variable_name, attributes)}


def settings_in_force(initial: Settings, current: Settings) -> Settings:
    """Return the settings after a reload: those of `current` that it applies, and the others of the start."""
    return evolve(initial, **{name: getattr(current, name) for name in RELOADABLE})


class RegistryTable:
    """The registries that are served now. `update` modifies the mappings and the set in place."""

    def __init__(self, settings: Settings) -> None:
        self.intercepted = RegistryMap()
        """Servers by the host that clients connect to. Docker Hub is here under each of its names."""
        self.mirrored = RegistryMap()
        """Registries by the value of `?ns=`."""
        self.hosted_names: set[str] = set()
        """Values of `?ns=` that mean the hosted registry."""
        self.update(settings)

    def update(self, settings: Settings) -> None:
        """Replace the entries by the registries of `settings`."""
        public_names = [] if settings.registry_url is None else [settings.registry_url.host.name]
        own_names = (*settings.registry_hostname, *public_names)
        self.hosted_names.clear()
        self.hosted_names.update(own_names)
        self._wildcards = settings.registry_wildcards
        intercepted = [(registry.host, registry) for registry in settings.intercepted]
        self.intercepted.replace(intercepted, self._wildcards, own_names)
        mirrored = [(registry.host, registry) for registry in settings.registries]
        mirrored += [(alias.host, DOCKER_HUB) for alias in DOCKER_HUB_ALIASES]
        self.mirrored.replace(mirrored, self._wildcards, own_names)

    def is_listed(self, server: Registry) -> bool:
        """Return whether the settings name `server` itself, or it is Docker Hub's."""
        return self.intercepted.get(server.host) == server and self.intercepted.covering(server.host) is None

    @property
    def status(self) -> str:
        """The text that `systemctl status` shows."""
        return f"serving {', '.join(dict.fromkeys(map(str, [*self.mirrored.values(), *self._wildcards])))}"


@frozen
class ReloadResult:
    """The result of a reload. `refused` is the reason, if the settings are unchanged.

    `status` says which registries are served now. `needing_restart` has the settings that have changed and are applied
    by a restart only, `warnings` and `problems` sentences about settings and about workers that could not apply them.
    """

    status: str
    refused: str | None = None
    warnings: tuple[str, ...] = ()
    needing_restart: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@define
class Reloader:
    """Reads the configuration with `read` and passes it to `apply`, which applies all settings or raises.

    `apply` returns sentences about worker processes that could not apply them. `initial` is the configuration that
    the daemon started with. A changed setting that a reload cannot apply is found by comparison with it. `current` is
    the one that was applied last.

    `audit` gets an entry for each. `on_ended` is called with whether the settings could be used.
    """

    read: Callable[[], Configuration]
    apply: Callable[[Configuration], Awaitable[Sequence[str]]]
    initial: Configuration
    registries: RegistryTable
    notifier: Notifier
    audit: AuditLog
    on_ended: Callable[[bool], None]
    current: Configuration = field(init=False)
    _lock: DeferredLock = field(factory=DeferredLock, init=False)

    @current.default
    def _current(self) -> Configuration:
        return self.initial

    def __call__(self) -> None:
        """Reload because of a signal."""
        spawn(self.reload(_SIGNAL), "reloading the settings")

    async def reload(self, principal: Principal) -> ReloadResult:
        """Reload for `principal`, after all reloads before, and return the result.

        If that fails, report the reason to the log and to systemd, and keep the current settings.
        """
        async with self._lock:
            return await self._reload(principal)

    async def _reload(self, principal: Principal) -> ReloadResult:
        self.notifier.reloading()
        outcome = "not reloaded: internal error; see the log"  # systemd waits for the end of a reload, however it ends
        try:
            result = await self._try_reload()
            outcome = f"not reloaded: {result.refused}" if result.refused else " ".join(result.problems)
        finally:
            self.audit.record(principal, "reload", "the settings", outcome or "done")
            self.notifier.ready("; ".join(filter(None, (self.registries.status, outcome))))
        return result

    async def _try_reload(self) -> ReloadResult:
        try:
            configuration = self.read()
            problems = await self.apply(configuration)
        except (SettingsError, HtpasswdError, OSError) as error:
            reason = describe_error(error)
            log.error("not reloaded, the settings are unchanged: {reason}", reason=reason)
            self.on_ended(False)
            return ReloadResult(self.registries.status, refused=reason)
        self.on_ended(True)
        self.current = configuration
        needing_restart = self._needing_restart(configuration.settings)
        for warning in configuration.settings.warnings:
            log.warn("{warning}", warning=warning)
        for name in needing_restart:
            log.warn("{name} has changed; restart the daemon to apply it", name=name)
        for problem in problems:
            log.error("{problem}", problem=problem)
        log.info("reloaded: {status}", status=self.registries.status)
        return ReloadResult(
            self.registries.status,
            warnings=configuration.settings.warnings,
            needing_restart=tuple(needing_restart),
            problems=tuple(problems),
        )

    def _needing_restart(self, settings: Settings) -> list[str]:
        names = [attribute.name for attribute in fields(Settings) if attribute.name not in RELOADABLE]
        if bool(settings.fleet) != bool(self.initial.settings.fleet):  # the parts of a member are made at the start
            names.append("fleet")
        return [name.upper() for name in names if getattr(settings, name) != getattr(self.initial.settings, name)]


def describe_error(error: Exception) -> str:
    """Return the error of a setting, or of a file that a setting names, as one sentence."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{reason.removesuffix('.')}."

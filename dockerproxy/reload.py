"""SIGHUP: the settings are read again, and those that may change under a running daemon do.

These are REGISTRIES, AUTH_REGISTRIES, HTPASSWD_FILE and ANONYMOUS_PULL. Whoever uses them holds a mapping, or asks an
object, whose content is changed between two requests; so no connection ends and no transfer notices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from attrs import define, fields
from twisted.logger import Logger

from dockerproxy.daemon.systemd import Notifier
from dockerproxy.oci.names import Host, Registry
from dockerproxy.registry.htpasswd import HtpasswdError
from dockerproxy.settings import DOCKER_HUB, Settings, SettingsError

_RELOADABLE = {
    "extra_registries",
    "auth_registries",
    "auth_registries_delimiter",
    "auth_registry_delimiter",
    "htpasswd_file",
    "anonymous_pull",
    "warnings",
}

log = Logger()


def reloadable_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Return those of `variables` that may change under a running daemon, as empty where they are not set."""
    attributes = _RELOADABLE - {"warnings"}
    names = ["REGISTRIES" if name == "extra_registries" else name.upper() for name in attributes]
    return {name: variables.get(name, "") for name in names}


class RegistryTable:
    """The registries that are served. The mappings stay the same objects, and always hold what is served now."""

    def __init__(self, settings: Settings) -> None:
        self.intercepted: dict[Host, Registry] = {}
        """By the host under which clients reach them."""
        self.mirrored: dict[Host, Registry] = {}
        """By what `?ns=` may call them; Docker Hub has a name that is none of its hosts."""
        self.update(settings)

    def update(self, settings: Settings) -> None:
        """Serve what `settings` say."""
        self.intercepted.clear()
        self.intercepted.update((registry.host, registry) for registry in settings.intercepted)
        self.mirrored.clear()
        self.mirrored.update((registry.host, registry) for registry in settings.registries)
        self.mirrored[Host.parse("docker.io")] = DOCKER_HUB

    @property
    def status(self) -> str:
        """What `systemctl status` says."""
        return f"serving {', '.join(str(registry) for registry in self.mirrored if registry.name != 'docker.io')}"


@define
class Reloader:
    """Reads the settings again with `read` and has them used by `use`, which changes everything or raises.

    `running` are the settings that the daemon started with.
    """

    read: Callable[[], Settings]
    apply: Callable[[Settings], None]
    initial_settings: Settings
    registries: RegistryTable
    notifier: Notifier

    def __call__(self) -> None:
        """Reload, or say in the log and to systemd why not."""
        self.notifier.reloading()
        try:
            settings = self.read()
            self.apply(settings)
        except (SettingsError, HtpasswdError, OSError) as error:
            reason = describe_error(error)
            log.error("not reloaded, the settings stay as they were: {reason}", reason=reason)
            self.notifier.ready(f"{self.registries.status}; not reloaded: {reason}")
            return
        for warning in settings.warnings:
            log.warn("{warning}", warning=warning)
        for name in self._needing_restart(settings):
            log.warn("{name} has changed, which takes effect at the next start only", name=name)
        log.info("reloaded: {status}", status=self.registries.status)
        self.notifier.ready(self.registries.status)

    def _needing_restart(self, settings: Settings) -> list[str]:
        names = [attribute.name for attribute in fields(Settings) if attribute.name not in _RELOADABLE]
        return [name.upper() for name in names if getattr(settings, name) != getattr(self.initial_settings, name)]


def describe_error(error: Exception) -> str:
    """Return what is wrong with a setting, or with a file that one names, as one sentence."""
    reason = str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{reason.removesuffix('.')}."

"""The settings in force and their sources, as people read them. Secrets are shown as ``***``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import Attribute, fields, frozen

from dockerproxy.reload import RELOADABLE, Configuration
from dockerproxy.settings import Settings, default_text, variable_name

_SECRET = re.compile(r"(?:SECRET|PASSWORD|PASSPHRASE|TOKEN|_KEY)$")
_USER_INFO = re.compile(r"(?<=//)\S*@")  # of a URL, as of a proxy: it may have a password
_LOGIN = re.compile(r"\S*@")
_MASK = "***"

# The variables that a setting may come from, beside its own, in their order.
_OTHER_VARIABLES = {
    "UPSTREAM_PROXY": ("HTTPS_PROXY", "https_proxy"),
    "STATE_DIR": ("STATE_DIRECTORY",),
    "RUNTIME_DIR": ("RUNTIME_DIRECTORY",),
}


@frozen
class ConfigReport:
    """The settings in force: those of the `current` configuration that a reload applies, and the others of `initial`.

    `initial` is the configuration that the daemon started with.
    """

    initial: Configuration
    current: Configuration

    def rows(self) -> list[dict[str, Any]]:
        """Return a JSON object for each setting, in the order of the documentation.

        ``value`` is the text in its source, or that of the default; it is empty if the setting is not set. ``source``
        is ``default``, ``environment``, ``credential`` or ``file``, and ``place`` the variable, the credential, or the
        file and the line. ``pending`` has the text that a restart would apply, or None.
        """
        rows = {}
        for attribute in fields(Settings):
            name = variable_name(attribute.name)
            if attribute.name != "warnings" and name not in rows:
                rows[name] = self._row(name, attribute)
        return list(rows.values())

    def _row(self, name: str, attribute: Attribute[Any]) -> dict[str, Any]:
        reloadable = attribute.name in RELOADABLE
        configuration = self.current if reloadable else self.initial
        source, place = _source(configuration, name)
        changed = getattr(self.initial.settings, attribute.name) != getattr(self.current.settings, attribute.name)
        pending = None if reloadable or not changed else _shown(self.current, name, attribute)
        return {
            "name": name,
            "value": _shown(configuration, name, attribute),
            "source": source,
            "place": place,
            "reload": reloadable,
            "pending": pending,
        }


def _source(configuration: Configuration, name: str) -> tuple[str, str]:
    for variable in (name, *_OTHER_VARIABLES.get(name, ())):
        if configuration.variables.get(variable, "").strip():
            return configuration.sources.get(variable, ("environment", variable))
    return "default", ""


def _shown(configuration: Configuration, name: str, attribute: Attribute[Any]) -> str:
    """Return the text of a setting, without its secrets."""
    settings, variables = configuration.settings, configuration.variables
    text = next(
        filter(str.strip, (variables.get(variable, "") for variable in (name, *_OTHER_VARIABLES.get(name, ())))), ""
    )
    if name == "AUTH_REGISTRIES":
        return " ".join(f"{host}:{_MASK}" for host in settings.auth_registries)
    if not text:
        return _default(settings, attribute)
    if isinstance(getattr(settings, attribute.name), Path):
        return str(getattr(settings, attribute.name))
    if attribute.repr is False or _SECRET.search(name):
        return _MASK
    if name == "UPSTREAM_PROXY":
        text = " ".join(_mask_login(word) for word in text.split())
    return _USER_INFO.sub(f"{_MASK}@", text)


def _mask_login(word: str) -> str:
    scheme, separator, rest = word.rpartition("//") if "//" in word else ("", "", word)
    return f"{scheme}{separator}{_LOGIN.sub(f'{_MASK}@', rest)}"


def _default(settings: Settings, attribute: Attribute[Any]) -> str:
    text = default_text(attribute)
    if text is not None:
        return text
    value = getattr(settings, attribute.name)  # derived from the machine, or from other settings
    return "" if value is None or (isinstance(value, Mapping | Iterable) and not value) else str(value)

"""The check of a file with settings before the daemon reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from dockerproxy.cache.pin_file import PinFile
from dockerproxy.config_files import read_config_file
from dockerproxy.proxy.certificate_file import CertificateFile
from dockerproxy.proxy.issuer import AuthorityError, load_configured_issuer
from dockerproxy.registry.htpasswd import HtpasswdError, check_htpasswd
from dockerproxy.reload import Configuration, describe_error
from dockerproxy.settings import Settings, SettingsError
from dockerproxy.upstream.tls import ClientContext


def check_env_file(path: str) -> tuple[str | None, Sequence[str]]:
    """Return why the daemon could not use the file at `path`, or None, and warnings about its settings.

    The files that it names are read, too, with the rights of this process. Nothing is changed.
    """
    try:
        settings = Configuration.read({"PATH": os.environ.get("PATH", os.defpath)}, path).settings
        _check_files(settings)
    except (SettingsError, HtpasswdError, AuthorityError, OSError) as error:
        return describe_error(error), ()
    return None, (*settings.warnings, *_pin_file_warnings(settings.pin_file))


def _pin_file_warnings(path: Path | None) -> Sequence[str]:
    """Return sentences about PIN_FILE, with which the daemon starts whatever is in it."""
    if path is None:
        return ()
    try:
        content, _ = read_config_file(path)
    except OSError as error:
        return (f"PIN_FILE: {path} cannot be read: {error.strerror}.",)
    return [f"PIN_FILE: {path}, {problem}." for problem in PinFile.parse(content).problems]


def _check_files(settings: Settings) -> None:
    if settings.ca_crt_file is not None and settings.ca_key_file is not None:
        load_configured_issuer(settings.ca_crt_file, settings.ca_key_file, settings.ca_key_passphrase, time.time())
    for name in ("HTPASSWD_FILE", "PROXY_HTPASSWD_FILE"):
        users = getattr(settings, name.lower())
        if users is not None:
            check_htpasswd(users, name)
    for prefix in ("REGISTRY", "PROXY"):
        certificate, key = (getattr(settings, f"{prefix.lower()}_{part}_file") for part in ("crt", "key"))
        CertificateFile.open(certificate, key, prefix, time.time)
    if settings.upstream_ca_file is not None:
        try:
            ClientContext(ca_file=str(settings.upstream_ca_file))
        except ValueError as error:
            raise SettingsError(str(error)) from None

"""All certificates of this server: those that its CA issues, and those in the administrator's files."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from dockerproxy.proxy.authority import CertificateAuthority
from dockerproxy.proxy.certificate_file import CertificateFile


@frozen
class Certificates:
    """The CA, and the administrator's certificates for the hosted registry and for the proxy's TLS port, if any.

    They are opened before the daemon forks, so that all processes share the keys. A worker that starts later has them
    even if the files are damaged by then.
    """

    authority: CertificateAuthority
    registry_file: CertificateFile | None = None
    proxy_file: CertificateFile | None = None

    @property
    def files(self) -> list[CertificateFile]:
        """The certificates in files."""
        return [file for file in (self.registry_file, self.proxy_file) if file is not None]

    def watch_files(self, reactor: Any) -> None:
        """Load the files again whenever they change, from now on."""
        for file in self.files:
            file.watch(reactor)

    def check_files(self) -> None:
        """Load the files again if they have changed."""
        for file in self.files:
            file.check()

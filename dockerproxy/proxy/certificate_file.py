"""A server certificate of the administrator's, from a company's CA or from ACME, which is reloaded when it changes."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import define, field, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from OpenSSL import SSL
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from dockerproxy.concurrency import spawn
from dockerproxy.http.tls import describe_handshake_error
from dockerproxy.proxy.issuer import (
    DAY,
    AuthorityError,
    IssuerFiles,
    build_path,
    get_extension,
    is_self_signed,
    load_certificates,
    load_key,
    public_key_matches,
    to_datetime,
    validity,
)
from dockerproxy.proxy.tls_contexts import make_context, use_certificate

_CHECK_INTERVAL = 60.0  # seconds between two looks at the files
_MAX_WARNING = 14 * DAY  # before the end; ACME clients renew a month before it

Signature = tuple[tuple[int, int, int], ...]

log = Logger()


@frozen
class _ServerCertificate:
    context: SSL.Context
    names: frozenset[str]
    addresses: frozenset[str]
    not_before: float
    not_after: float


@define
class CertificateFile:
    """The certificate in one file, with its chain, and its key in another.

    `context` is the OpenSSL context with the current certificate. A new pair that cannot be used is logged, and the
    previous one stays: while a client of ACME writes one file after the other, they do not belong together.
    """

    _files: IssuerFiles
    _clock: Callable[[], float]
    _loaded: _ServerCertificate
    _signature: Signature | None
    _warned_at: float = field(default=0.0, init=False)

    @classmethod
    def open(
        cls, certificate: Path | None, key: Path | None, prefix: str, clock: Callable[[], float]
    ) -> CertificateFile | None:
        """Load the files of the settings `prefix`_CRT_FILE and `prefix`_KEY_FILE; return None if they are not set.

        Raise `AuthorityError` if they cannot be used.
        """
        if certificate is None or key is None:
            return None
        files = IssuerFiles(certificate, f"{prefix}_CRT_FILE", key, f"{prefix}_KEY_FILE", passphrase_setting=None)
        signature = _signature(files)
        opened = cls(files, clock, _load(files), signature)
        opened.warn_before_end()
        return opened

    @property
    def context(self) -> SSL.Context:
        """The OpenSSL context with the current certificate, its chain and its key."""
        return self._loaded.context

    def covers(self, name: str) -> bool:
        """Return whether the certificate is valid for `name`: a DNS name in lower case, or an IP address."""
        loaded = self._loaded
        return name in loaded.names or name in loaded.addresses or f"*.{name.partition('.')[2]}" in loaded.names

    def watch(self, reactor: Any) -> None:
        """Look every minute whether the files have changed, from now on."""
        loop = LoopingCall(self.check)
        loop.clock = reactor

        async def run() -> None:
            await loop.start(_CHECK_INTERVAL, now=False)

        spawn(run(), "watching the certificate files")

    def check(self) -> None:
        """Load the files again if they have changed, and warn before the certificate ends."""
        signature = _signature(self._files)
        if signature is not None and signature != self._signature:
            self._signature = signature
            try:
                self._loaded = _load(self._files)
            except AuthorityError as error:
                log.error("{reason}; the previous certificate stays in use", reason=str(error))
            else:
                end = f"{to_datetime(self._loaded.not_after):%Y-%m-%d}"
                log.info("{prefix} was loaded again, it is valid until {end}", prefix=self._prefix, end=end)
                self._warned_at = 0.0
        self.warn_before_end()

    def warn_before_end(self) -> None:
        """Log a warning, once a day, if the certificate has ended or is about to."""
        loaded, now = self._loaded, self._clock()
        period = min(_MAX_WARNING, (loaded.not_after - loaded.not_before) / 4)
        if loaded.not_before <= now < loaded.not_after - period or now < self._warned_at + DAY:
            return
        self._warned_at = now
        start, end = (f"{to_datetime(time):%Y-%m-%d %H:%M} UTC" for time in (loaded.not_before, loaded.not_after))
        if now < loaded.not_before:
            log.error("{prefix} is not valid before {start}; clients refuse it", prefix=self._prefix, start=start)
        elif now >= loaded.not_after:
            log.error("{prefix} expired on {end}; clients refuse it", prefix=self._prefix, end=end)
        else:
            log.warn("{prefix} expires on {end}; replace it", prefix=self._prefix, end=end)

    @property
    def _prefix(self) -> str:
        return f"{self._files.certificate_setting}: {self._files.certificate}"


def _load(files: IssuerFiles) -> _ServerCertificate:
    """Load both files. Raise `AuthorityError`."""
    certificates = load_certificates(files)
    key, _ = load_key(files, None)
    certificate = certificates[0]
    if not public_key_matches(certificate, key):
        raise AuthorityError(
            f"{files.key_setting}: {files.key} is not the key of the first certificate in {files.certificate}"
        )
    names = get_extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        raise AuthorityError(
            f"{files.certificate_setting}: the certificate in {files.certificate} has no subjectAltName; "
            "clients would refuse it"
        )
    context = make_context()
    context.set_session_id(certificate.fingerprint(hashes.SHA256()))  # pyOpenSSL accepts at most 32 bytes
    chain = [issuer for issuer in build_path(certificates)[1:] if not is_self_signed(issuer)]
    try:
        use_certificate(context, certificate, key, chain)
    except SSL.Error as error:  # a weak key or signature
        raise AuthorityError(
            f"{files.certificate_setting}: OpenSSL does not accept the certificate in {files.certificate}: "
            f"{describe_handshake_error(error)}"
        ) from None
    return _ServerCertificate(
        context,
        frozenset(name.lower() for name in names.get_values_for_type(x509.DNSName)),
        frozenset(str(ipaddress.ip_address(str(address))) for address in names.get_values_for_type(x509.IPAddress)),
        *validity(certificate),
    )


def _signature(files: IssuerFiles) -> Signature | None:
    """Return what changes if a file is written or replaced; None if one is missing."""
    try:
        stats = [os.stat(path) for path in (files.certificate, files.key)]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

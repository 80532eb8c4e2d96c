"""Signatures of requests to an object store (AWS Signature Version 4), by botocore, with its chain of credentials.

Only a daemon with REGISTRY_STORE imports this module, because botocore takes 30 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import EnvProvider, RefreshableCredentials
from botocore.exceptions import BotoCoreError
from botocore.session import Session

from dockerproxy.concurrency import SingleFlight, in_thread
from dockerproxy.errors import StoreRefused

UNSIGNED = "UNSIGNED-PAYLOAD"

_SEARCH_INTERVAL = 10.0  # seconds between two looks for other credentials


class NoCredentials(Exception):
    """There is no credential for the object store. The message says how to give one."""


class RequestSigner:
    """Signs requests to a store in `region`. `credentials` are botocore's; they may be refreshed in a thread.

    `find` looks for them again and blocks, because another program may have written a new file of credentials.
    `generation` is another number as soon as there are others.
    """

    def __init__(self, reactor: Any, region: str, credentials: Any, find: Callable[[], Any]) -> None:
        self.generation = 0
        self._reactor = reactor
        self._region = region
        self._credentials = credentials
        self._find = find
        self._frozen: Any = None
        self._refreshes: SingleFlight[str, None] = SingleFlight()
        self._searches: SingleFlight[str, None] = SingleFlight()
        self._next_search = 0.0

    @classmethod
    def find_credentials(cls, reactor: Any, region: str, variables: Mapping[str, str]) -> RequestSigner:
        """Return a signer with the first credential of botocore's chain; `variables` come first. Blocks.

        Raise `NoCredentials`.
        """
        find = partial(_find, variables)
        try:
            credentials = find()
        except BotoCoreError as error:
            raise NoCredentials(f"botocore cannot read the credentials: {error}") from None
        if credentials is None:
            raise NoCredentials(
                "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use another way that"
                " botocore knows (a shared credentials file, the role of the machine)"
            )
        return cls(reactor, region, credentials, find)

    async def sign(
        self, method: str, url: str, fields: Iterable[tuple[str, str]], payload_hash: str
    ) -> list[tuple[str, str]]:
        """Return `fields` and those of the signature. Raise `StoreRefused` if there is no valid credential."""
        if self._frozen is None or self._needs_refresh():
            await self._refreshes.do("", self._refresh)
        return self._sign(method, url, fields, payload_hash)

    async def renew(self, generation: int) -> bool:
        """Look for other credentials, because the store refuses those of `generation`. Return whether there are any."""
        if self.generation == generation and self._reactor.seconds() >= self._next_search:
            await self._searches.do("", self._search)
        return self.generation != generation

    async def _search(self) -> None:
        self._next_search = self._reactor.seconds() + _SEARCH_INTERVAL
        found = await in_thread(self._reactor, self._find_frozen)
        if found is not None and found[1] != self._frozen:
            self._credentials, self._frozen = found
            self.generation += 1

    def _find_frozen(self) -> tuple[Any, Any] | None:
        try:
            credentials = self._find()
            return None if credentials is None else (credentials, credentials.get_frozen_credentials())
        except (BotoCoreError, RuntimeError):  # the old ones stay, and the store has said what is wrong with them
            return None

    def sign_now(
        self, method: str, url: str, fields: Iterable[tuple[str, str]], payload_hash: str
    ) -> list[tuple[str, str]]:
        """Sign as `sign` does, for a process that does not serve yet. Blocks. Raise `StoreRefused`."""
        self._read_credentials()
        return self._sign(method, url, fields, payload_hash)

    def _sign(
        self, method: str, url: str, fields: Iterable[tuple[str, str]], payload_hash: str
    ) -> list[tuple[str, str]]:
        request = AWSRequest(method=method, url=url, headers=dict(fields))
        request.context["payload_hash"] = payload_hash
        _KnownPayloadAuth(self._frozen, "s3", self._region).add_auth(request)
        return list(request.headers.items())

    def _needs_refresh(self) -> bool:
        return isinstance(self._credentials, RefreshableCredentials) and self._credentials.refresh_needed()

    async def _refresh(self) -> None:
        await in_thread(self._reactor, self._read_credentials)

    def _read_credentials(self) -> None:
        try:
            self._frozen = self._credentials.get_frozen_credentials()
        except (BotoCoreError, RuntimeError) as error:
            raise StoreRefused(
                f"the credentials for the object store cannot be refreshed: {error}", headers=[("Retry-After", "30")]
            ) from None


def _find(variables: Mapping[str, str]) -> Any:
    return EnvProvider(variables).load() or Session().get_credentials()


class _KnownPayloadAuth(S3SigV4Auth):  # type: ignore[misc]
    """Takes the hash of the payload from the request, because its bytes may be in a file."""

    def payload(self, request: Any) -> str:
        payload_hash: str = request.context["payload_hash"]
        return payload_hash

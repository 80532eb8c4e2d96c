"""The look at the bucket before the daemon serves: is it there, may we use it, and does it know conditions?

A wrong bucket, key, region or clock stops the start. A store that does not answer does not, because it may come back
before this daemon is asked for anything. Everything here blocks. It uses botocore's HTTP client, because the reactor
does not run yet.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from attrs import define
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError
from botocore.httpsession import URLLib3Session

from dockerproxy.bucket import keys
from dockerproxy.bucket.request_signer import RequestSigner
from dockerproxy.bucket.s3_xml import parse_answer
from dockerproxy.bucket.store_errors import IGNORES_CONDITIONS, StoreAnswer
from dockerproxy.errors import StoreRefused
from dockerproxy.net.store_location import StoreLocation

_TIMEOUT = 5.0  # seconds


@define
class StartProbe:
    """Asks the bucket at `location`. `verify` is a CA file, or whether to verify certificates.

    `proxies` are URLs of proxies, of which the first that can is used. None stands for no proxy.
    """

    location: StoreLocation
    signer: RequestSigner
    proxies: Sequence[str | None] = (None,)
    verify: str | bool = True

    def run(self, *, read_only: bool) -> list[str]:
        """Return sentences for the log. Raise `StoreRefused` if the bucket can never be used so."""
        key = f"{keys.PROBES}{secrets.token_hex(8)}"
        try:
            answer, content = self._send("GET", "", [("list-type", "2"), ("max-keys", "1")])
            if answer is None:
                self._check_is_store(content)
                return [] if read_only else self._try_conditions(key)
        except (BotoCoreError, OSError) as error:
            return [f"{self.location} does not answer ({error}); until it does, pushes fail"]
        return self._judge(answer)

    def _check_is_store(self, listing: bytes) -> None:
        try:
            is_store = parse_answer(listing).root == "ListBucketResult"
        except ValueError:
            is_store = False
        if not is_store:  # such as the console of a store, which has another port
            raise StoreRefused(
                f"{self.location} answers, but not as an object store does; correct endpoint= in REGISTRY_STORE"
            )

    def _try_conditions(self, key: str) -> list[str]:
        condition = [("If-None-Match", "*")]
        first, _ = self._send("PUT", key, fields=condition)
        if first is not None:
            return self._judge(first)
        second, _ = self._send("PUT", key, fields=condition)
        self._send("DELETE", key)
        return [] if second is not None and second.status == 412 else [f"{self.location} {IGNORES_CONDITIONS}"]

    def _judge(self, answer: StoreAnswer) -> list[str]:
        error = answer.error(self.location)
        if isinstance(error, StoreRefused):
            raise error
        return [f"{error.message}; until then, pushes fail"]

    def _send(
        self, method: str, key: str, query: Sequence[tuple[str, str]] = (), fields: Sequence[tuple[str, str]] = ()
    ) -> tuple[StoreAnswer | None, bytes]:
        """Return the refusal, or None after a success, and the content."""
        url = self.location.url(key, query)
        signed = self.signer.sign_now(method, url, fields, hashlib.sha256().hexdigest())
        request = AWSRequest(method, url, dict(signed), b"").prepare()
        response = self._send_through_proxies(request)
        content: bytes = response.content
        return None if response.status_code < 300 else StoreAnswer.parse(response.status_code, content), content

    def _send_through_proxies(self, request: Any) -> Any:
        failure: Exception | None = None
        for number, proxy in enumerate(self.proxies):
            proxies = None if proxy is None else {"http": proxy, "https": proxy}
            session = URLLib3Session(verify=self.verify, proxies=proxies, timeout=_TIMEOUT)
            try:
                response = session.send(request)
            except (BotoCoreError, OSError) as error:
                failure = failure or error
            else:
                self.proxies = self.proxies[number:]  # those before it would cost time again
                return response
            finally:
                session.close()
        assert failure is not None
        raise failure

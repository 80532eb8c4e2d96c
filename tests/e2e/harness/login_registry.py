"""A registry with logins that end, as those of cloud registries do."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from tests.e2e.harness.fake_registry import FakeRegistry
from tests.e2e.harness.http_client import basic_authorization
from tests.e2e.harness.http_server import HTTPExchange

BASIC_CHALLENGE = 'Basic realm="https://login.test/",service="ecr.amazonaws.com"'  # as ECR's


class LoginRegistry(FakeRegistry):
    """A registry with Basic, and one user, whose password can change.

    `challenges` are its WWW-Authenticate fields, one line each. It refuses a wrong login with `refusal_status`, also
    for the repositories in `public`, which need none. `on_login` is called after each login that is right.
    """

    def __init__(self, context: ssl.SSLContext, user: str, password: str) -> None:
        super().__init__(context)
        self.user = user
        self.password = password
        self.reset()

    def reset(self) -> None:
        """Return to the behaviour of a new registry, and clear the list of requests."""
        self.reset_rules()
        self.challenges = [BASIC_CHALLENGE]
        self.refusal_status = 401
        self.public: set[str] = set()
        self.on_login: Callable[[], object] = lambda: None

    def handle(self, exchange: HTTPExchange) -> None:
        authorization = exchange.request.headers.get("authorization")
        if authorization == basic_authorization(self.user, self.password):
            super().handle(exchange)
            self.on_login()
        elif authorization is None and any(exchange.path.startswith(f"/v2/{name}/") for name in self.public):
            super().handle(exchange)
        else:
            status = 401 if authorization is None else self.refusal_status
            fields = {"Content-Type": "application/json", "WWW-Authenticate": self.challenges}
            exchange.respond(status, fields, b'{"errors":[{"code":"DENIED","message":"no valid login"}]}')

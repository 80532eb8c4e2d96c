"""The client of a request to the hosted registry, or of a command on the control socket."""

from __future__ import annotations

from attrs import frozen

from dockerproxy.http.request import Request
from dockerproxy.shares import client_key

CONTROL_SOCKET = "the control socket"


@frozen
class Principal:
    """The client of a request: its user, or None if it has not logged in, and where the request comes from.

    The user of a command on the control socket is a user of this machine, and its address is `CONTROL_SOCKET`.
    """

    user: str | None
    address: str
    user_agent: str | None

    @classmethod
    def of(cls, request: Request, user: str | None) -> Principal:
        """Return the principal of `request`, which authenticated as `user`."""
        return cls(user, request.client, request.user_agent)

    @property
    def owner(self) -> str:
        """The text that this client's uploads are counted by: its user, or its address if it has not logged in."""
        return client_key(self.address) if self.user is None else f"user {self.user}"

    def __str__(self) -> str:
        return self.address if self.user is None else f"{self.user} at {self.address}"

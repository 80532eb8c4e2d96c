"""The settings of the hosted registry that say which requests it refuses from everybody."""

from __future__ import annotations

from attrs import define

from dockerproxy.errors import Unsupported
from dockerproxy.http.message import READ_METHODS, SAFE_METHODS
from dockerproxy.http.request import Request
from dockerproxy.oci.routes import Kind, Target


@define
class HostedRules:
    """The requests that the hosted registry allows. A reload sets the attributes; they apply to later requests.

    If `allow_sparse_indexes` is true, an index may be pushed without some of its images.
    """

    read_only: bool = False
    allow_delete: bool = True
    allow_sparse_indexes: bool = False

    def check(self, request: Request, target: Target) -> None:
        """Raise `Unsupported` if the settings do not allow the request."""
        if request.method in READ_METHODS:
            return
        if self.read_only:
            raise _refusal("this registry is read-only (REGISTRY_READ_ONLY); pushes and deletions are switched off")
        # The deletion of an upload is the end of a push.
        if request.method == "DELETE" and target.kind is not Kind.UPLOAD and not self.allow_delete:
            raise _refusal("deletions are switched off in this registry (ALLOW_DELETE=false)")


def _refusal(message: str) -> Unsupported:
    return Unsupported(message, headers=[("Allow", ", ".join(SAFE_METHODS))])

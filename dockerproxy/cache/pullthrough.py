"""The pull-through cache: a registry whose missing pieces are fetched.

`PullThrough` is what all clients share. `CachedRegistry` is one registry as one client sees it: it decides which
credential speaks for the client upstream, and hands the questions to `manifests` and `blobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from attrs import define, field, frozen

from dockerproxy.cache.blobs import CachedBlobs
from dockerproxy.cache.challenges import TOKEN_PATH, Challenges
from dockerproxy.cache.identity import Identities
from dockerproxy.cache.manifests import CachedManifests
from dockerproxy.cache.origin import Answer, Origin, Upstream, Visitor, refuse
from dockerproxy.cache.tokens import TokenDesk, TokenRequest
from dockerproxy.errors import (
    ManifestInvalid,
    NameUnknown,
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamRefused,
    is_outage,
)
from dockerproxy.http.headers import Headers
from dockerproxy.oci.challenge import Challenge
from dockerproxy.oci.contents import BlobAnswer, ManifestAnswer
from dockerproxy.oci.manifests import EMPTY_INDEX, MAX_MANIFEST, OCI_INDEX, fallback_tag, filter_referrers
from dockerproxy.oci.names import Digest, Reference, Registry, Repository
from dockerproxy.upstream.credentials import Anonymous, Configured, Credential, Own


@define
class PullThrough:
    """What the cache of all registries is made of.

    `registries` are those that are served at the time, `login` returns the login of ours at a registry that serves
    every client, or None.
    """

    upstream: Upstream
    identities: Identities
    challenges: Challenges
    desk: TokenDesk
    manifests: CachedManifests
    blobs: CachedBlobs
    registries: Iterable[Registry]
    login: Callable[[Registry], Configured | None]
    clock: Callable[[], float]

    def registry(self, registry: Registry, authorization: str | None) -> CachedRegistry:
        """Return `registry` for a client that shows `authorization` (its Authorization field, if any).

        Of one that bears a token of ours which has ended, or was given for another registry, only `Unauthorized` comes.
        """
        voucher = self.identities.read(registry, authorization, self.clock()) if authorization is not None else None
        return CachedRegistry(self, registry, authorization if voucher is None else None, voucher)

    def served_at(self, host: Registry, path: str) -> Registry | None:
        """Return the registry whose tokens are given out at `path` of `host`, if any."""
        if path == TOKEN_PATH:
            return host if self.challenges.realm(host) is not None else None
        for registry in self.registries:
            realm = self.challenges.realm(registry)
            if realm is not None and realm.server.host == host.host and realm.path == path:
                return registry
        return None

    async def token(self, registry: Registry, query: str, authorization: str | None, form: bytes | None) -> bytes:
        """Return what the realm of `registry` answers to a client, or we in its place."""
        realm = self.challenges.realm(registry)
        if realm is None:
            raise NameUnknown(f"{registry} has no token server")
        return await self.desk.token(registry, realm, TokenRequest(query, authorization, form))


@frozen
class Referrers:
    """An index of referrers; `filtered` says whether the artifact type that was asked for is applied."""

    content: bytes
    filtered: bool


@frozen
class CachedRegistry:
    """One registry as one client sees it: with the client's own Authorization, or on the word of a token of ours.

    `voucher` is what `Identities.read` says of the client's token: None where it bears none of ours.
    """

    cache: PullThrough
    registry: Registry
    authorization: str | None = field(repr=False)
    voucher: str | None

    @property
    def credential(self) -> Credential:
        """What speaks for the client upstream: its own, which wins, or the login that is shared, or nothing."""
        if self.authorization is not None:
            return Own(self.authorization)
        return self.cache.login(self.registry) or Anonymous()

    async def visitor(self, name: Repository) -> Visitor:
        """Return the client as it stands before the repository `name`. Raise `Unauthorized`."""
        self._check_token()
        await self.cache.challenges.meet(self.registry)
        credential = self.credential
        identity = self.cache.identities.of(self.registry, credential)
        return Visitor(Origin(self.registry, name, credential), identity, self.voucher)

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestAnswer:
        """Return a manifest. Raise `UpstreamRefused`, `UpstreamError`."""
        return await self.cache.manifests.get(await self.visitor(name), reference, accept, head=head)

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobAnswer:
        """Return a blob. Raise `UpstreamRefused`, `UpstreamError`."""
        blobs, visitor = self.cache.blobs, await self.visitor(name)
        return await (blobs.head(visitor, digest) if head else blobs.get(visitor, digest))

    async def ping(self) -> None:
        """Answer `/v2/`: return where the client may go on, raise `Unauthorized` where it has to show something."""
        self._check_token()
        if self.authorization is not None:
            await self._ping_upstream()
        elif self.voucher is None and not self._is_open(await self.cache.challenges.of(self.registry)):
            raise Unauthorized("authentication required")

    async def _ping_upstream(self) -> None:
        """Let upstream judge what the client shows; while it cannot, each repository's own check has to do."""
        try:
            answer = await self.forward("GET", "/v2/", None, Headers())
            if answer.status == 401:
                raise await refuse(self.registry, answer)
            await answer.discard()
        except RegistryError as error:
            if not is_outage(error):
                raise

    def _is_open(self, challenges: list[Challenge]) -> bool:
        """Whether a client that shows nothing can go on: nothing is asked, or a Basic login that is shared."""
        shared = self.cache.login(self.registry) is not None
        return not challenges or (shared and all(challenge.scheme == "basic" for challenge in challenges))

    def _check_token(self) -> None:
        if self.voucher == "":
            raise Unauthorized("the token has ended")

    async def referrers(self, name: Repository, digest: Digest, query: str, artifact_type: str | None) -> Referrers:
        """Return the referrers of `digest`; those of the fallback tag where upstream has no referrers API."""
        self._check_token()
        path = f"/v2/{name}/referrers/{digest}" + (f"?{query}" if query else "")
        answer = await self.cache.upstream.request(
            "GET", self.registry, path,
            name=name, credential=self.credential, headers=Headers([("accept", OCI_INDEX)]),
        )  # fmt: skip
        if answer.status == 200:
            filtered = "artifactType" in (answer.headers.get("oci-filters-applied") or "")
            content = await answer.read_all(MAX_MANIFEST)
            self._filter(content, "")
            return Referrers(content, filtered)
        if answer.status != 404:
            raise await refuse(self.registry, answer)
        await answer.discard()
        try:
            found = await self.manifest(name, fallback_tag(digest), [OCI_INDEX], head=False)
            content = found.content or EMPTY_INDEX
        except UpstreamRefused as error:
            if error.status != 404:
                raise
            content = EMPTY_INDEX
        if artifact_type is None:
            return Referrers(content, False)
        return Referrers(self._filter(content, artifact_type), True)

    def _filter(self, index: bytes, artifact_type: str) -> bytes:
        try:
            return filter_referrers(index, artifact_type)
        except ManifestInvalid:
            raise UpstreamBroken(f"{self.registry} sent something that is no index of referrers") from None

    async def forward(
        self, method: str, path: str, name: Repository | None, headers: Headers, body: Any = None
    ) -> Answer:
        """Return upstream's answer to a request as it is, redirects included; its body is the caller's to read."""
        self._check_token()
        credential = self.credential
        if self.authorization is None and (method not in ("GET", "HEAD") or not path.startswith("/v2/")):
            # What our credential can pull is shared; what it can write, and what the registry has beside, is not.
            credential = Anonymous()
        return await self.cache.upstream.request(
            method, self.registry, path,
            name=name, credential=credential, headers=headers, body=body, follow=False,
            actions="pull" if method in ("GET", "HEAD") else "pull,push",
        )  # fmt: skip

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]:
        """Return the WWW-Authenticate fields that go with a 401: upstream's own, or the registry's usual ones."""
        fields = [value for name, value in error.headers if name.lower() == "www-authenticate"]
        if not fields:
            fields = [challenge.render() for challenge in self.cache.challenges.remembered(self.registry)]
        return self.cache.challenges.tell(self.registry, fields, secure=secure)

"""The last word of upstream about the signatures and other referrers of an image, for outages.

cosign and others ask for them with every image, and fail if upstream cannot be asked, although the image is cached and
has none. So it is remembered that upstream has no such tag, and which referrers it has listed.
"""

from __future__ import annotations

from attrs import frozen

from dockerproxy.cache.access import Access, AccessState
from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.cache.upstream import UpstreamPrincipal
from dockerproxy.errors import DigestInvalid, HeadRefused, ManifestUnknown, RegistryError
from dockerproxy.oci.manifests import OCI_INDEX, OCI_MANIFEST, accepts, fallback_base, fallback_tag
from dockerproxy.oci.names import Digest, Reference, Tag
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records

ABSENCE, REFERRERS = "absence", "referrers"
"""Kinds of records. Their keys are the repository and the tag, or the digest."""

_SUFFIXES = ("", ".sig", ".att", ".sbom")  # a bound for the number of records of an image
_MAX_REFERRERS = 16 * 1024  # bytes of an index, some 50 referrers


def companion_base(tag: str) -> Digest | None:
    """Return the digest of the image that a tag is derived from; None if it is the name of an image itself."""
    base = fallback_base(tag)
    if base is None or tag.removeprefix(base) not in _SUFFIXES:
        return None
    try:
        return Digest.parse(base.replace("-", ":", 1))
    except DigestInvalid:  # a longer digest, of which a tag has a part only
        return None


@frozen
class Companions:
    """Remembers the companions of cached manifests: one record for each tag, and one for the list of referrers.

    During an outage a client may know of them if it may read content of the repository that is as public as they are.
    """

    _records: Records
    _links: Links
    _access: Access

    def record_absence(self, principal: UpstreamPrincipal, reference: Reference, media_types: frozenset[str]) -> None:
        """Remember that upstream has no tag `reference`, if that is a companion of a manifest in the cache.

        `media_types` are those that the client accepts. If a signature or an index is none of them, it may be there.
        """
        key = principal.repository.key
        base = None if isinstance(reference, Digest) else companion_base(reference)
        if base is None or not self._links.has_manifest(key, base):
            return
        if not accepts(media_types, OCI_INDEX if str(reference) == fallback_tag(base) else OCI_MANIFEST):
            return
        value = {"public": principal.identity == PUBLIC}
        saved = self._records.get(ABSENCE, key, str(reference))
        if saved is None or (saved != value and value["public"]):
            try_put(self._records, value, ABSENCE, key, str(reference))

    def forget_absence(self, principal: UpstreamPrincipal, tag: Tag) -> None:
        """Forget that upstream had no such tag, because it has one now."""
        if companion_base(tag) is not None:
            try_remove(self._records, ABSENCE, principal.repository.key, tag)

    def check_absence(self, principal: UpstreamPrincipal, tag: Tag, outage: RegistryError) -> None:
        """Raise `ManifestUnknown` if upstream had no such tag when it was asked last, before `outage`."""
        if companion_base(tag) is None:
            return
        if isinstance(outage, HeadRefused) and outage.head_status == 404:
            outage = outage.outage  # the refusal says the same as the last word
        saved = self._records.get(ABSENCE, principal.repository.key, tag)
        if saved is not None and self._may_know(principal, outage, saved.get("public") is True):
            raise ManifestUnknown(f"{principal.repository.registry} had no {tag}, and cannot be asked now: {outage}")

    def record_referrers(self, principal: UpstreamPrincipal, subject: Digest, index: bytes) -> None:
        """Remember `index`, all referrers of `subject`, if that is a manifest in the cache.

        The answer to a client without access counts for nothing, because it may hide that there is anything.
        """
        key, public = principal.repository.key, principal.identity == PUBLIC
        if self._access.state(key, principal.identity, public=public) is AccessState.UNKNOWN:
            return
        if len(index) > _MAX_REFERRERS:
            try_remove(self._records, REFERRERS, key, str(subject))
        elif self._links.has_manifest(key, subject):
            value = {"public": public, "index": index.decode("latin-1")}
            if self._records.get(REFERRERS, key, str(subject)) != value:
                try_put(self._records, value, REFERRERS, key, str(subject))

    def stale_referrers(self, principal: UpstreamPrincipal, subject: Digest, outage: RegistryError) -> bytes | None:
        """Return the last index of all referrers of `subject`, or None if `principal` may not know one."""
        saved = self._records.get(REFERRERS, principal.repository.key, str(subject)) or {}
        index = saved.get("index")
        if not isinstance(index, str) or not self._may_know(principal, outage, saved.get("public") is True):
            return None
        try:
            return index.encode("latin-1")
        except UnicodeEncodeError:  # not ours
            return None

    def _may_know(self, principal: UpstreamPrincipal, outage: RegistryError, public: bool) -> bool:
        return self._access.outage_identity(principal, outage, public=public) is not None

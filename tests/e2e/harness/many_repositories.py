"""A cache with many repositories."""

from __future__ import annotations

import time

from dockerproxy.cache.access import Access
from dockerproxy.cache.identity import PUBLIC
from dockerproxy.oci.manifests import OCI_MANIFEST
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.records import Records
from tests.e2e.harness.daemon import TwistdDaemon


def start_with_repositories(daemon: TwistdDaemon, count: int, *, public_step: int = 1) -> None:
    """Restart the daemon with `count` cached repositories of fake.test. One in `public_step` is public."""
    daemon.stop()
    layout = Layout(daemon.state_folder / "cache")
    manifest = b'{"schemaVersion":2,"layers":[],"config":{"mediaType":"x","digest":"sha256:%064d","size":1}}' % 0
    digest = Digest.of(manifest)
    Blobs(layout, durable=False).put(manifest, digest)
    links, access = Links(layout, durable=False), Access(Records(layout.root / "records"), time.time)
    for number in range(count):
        name = f"fake.test/team{number % 100}/service-{number}"
        links.link_manifest(name, digest, OCI_MANIFEST)
        if number % public_step == 0:
            access.record_grant(name, PUBLIC, time.time())
    daemon.start()

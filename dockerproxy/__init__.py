"""A caching proxy for Docker registries, and a registry of its own.

The packages, in the order in which a request passes through them. Each package imports only packages further down the
list; tests/test_imports.py checks that.

- `tap` is the plugin that `twistd dockerproxy` starts. Read it first: it builds the daemon from `settings`. `app`
  builds the part that serves clients, which is the same in every process of the daemon (`workers`). `reload` handles
  SIGHUP.
- `proxy` is the forward proxy. It reads the head of the first request and decides whether to open a tunnel, to
  intercept the connection with a certificate of our own CA, or to respond itself.
- `registry` serves the OCI distribution API over `http`. It does not depend on the source of the content.
- `cache` is the pull-through cache. It reads blobs and manifests from the `store`, and fetches the missing ones from
  an `upstream` registry, once for all clients that request the same one at the same time.
- `fleet` lets the cache ask other daemons before upstream, and serves them. It is loaded only if FLEET is set.
- `cli` is the command `dockerproxy`, and `commands` has its parts. `admin` serves that command and the endpoints for
  browsers. `operations` is the process in which garbage is collected, and stores are verified and imported;
  `bucket_operations` is that for a bucket.
- `net` connects to other machines, `daemon` integrates with systemd and the log, `concurrency` runs coroutines.
- `oci` has the data types: `Host`, `Registry`, `Repository`, `Tag`, `Digest`. `errors` has the exceptions; each one
  carries its HTTP status and its error code of the distribution API.
"""

__version__ = "0.1.0"

"""A caching proxy for Docker registries: a registry whose missing pieces are fetched.

The way of a request, top to bottom; a package imports only what is below it (tests/test_imports.py holds that):

- `tap` is what `twistd dockerproxy` starts. Read it first: the daemon is composed there from `settings`, and in
  `assembly` what serves clients; that is in each of its processes (`workers`) the same.
- `proxy` is the front door: it reads the first request head and decides whether to tunnel, to intercept with a
  certificate of our own CA, or to answer.
- `registry` speaks the OCI distribution API over `http`, ignorant of where content comes from.
- `cache` is where it comes from: the `store` where it is there, an `upstream` registry where it is missing, once for
  all who ask at the same time.
- `cli` is the command `dockerproxy`; `admin` answers it, and browsers.
- `net` connects to other machines, `daemon` talks to the host system, `tasks` runs coroutines.
- `oci` has the nouns: `Host`, `Registry`, `Repository`, `Tag`, `Digest`; `errors` has what can go wrong, in the
  registry's own terms.
"""

__version__ = "0.1.0"

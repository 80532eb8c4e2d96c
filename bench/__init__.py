"""`make bench`: what the daemon costs, measured beside nginx and docker-registry in the same run.

A benchmark, not a test: it says what is, and fails for nothing but an answer that is wrong. The way of a figure:

- `stage` sets up what is measured: a registry that is an nginx with static files, the daemon, and the nginx that serves
  the same files over TLS, each a process of its own with one worker; for what is pushed, a docker-registry.
- `measures` and `push` have functions that put loads on them, one server after the other in every round.
- A load is one of the jobs in `loads`, done at the same time by several of the `clients`, which are processes too.
- `servers` reads from /proc what a server's processes used meanwhile.
- `table` takes the medians of the rounds and prints them.

CPU time is what to compare: it holds on a machine that others work on, and where clients are slower than the server.
"""

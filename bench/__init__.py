"""`make bench`: what the daemon costs, measured beside nginx, docker-registry and skopeo in the same run.

A benchmark, not a test: it says what is, and fails for nothing but an answer that is wrong. The way of a figure:

- `stage` sets up what is measured: a registry that is an nginx with the files of `content`, the `daemon`, and what it
  is measured beside, `nginx` or `docker_registry`, each a process, or several, of its own.
- `hits`, `misses`, `requests`, `footprint`, `image` and `push` have the measures, functions that put loads on the
  servers, one after the other in every round, in the way of `measures`.
- A load comes from the `generator`, which is written in C, or, where a client need not be fast, is one of the jobs in
  `loads`, done at the same time by several of the `clients`, which are processes too.
- `servers` reads from /proc what a server's processes used meanwhile.
- `table` takes the medians of the rounds and prints them; `goals` says which of them are as they are to be; `document`
  puts both into docs/performance.md.

CPU time is what to compare: it holds on a machine that others work on, and where clients are slower than the server.

Two other programs are here. `make soak`: `soak` watches memory and descriptors of a daemon while `visitors` use it. And
`make profile`: `profile` samples, by perf, where the daemon's CPU time goes under some of the loads.
"""

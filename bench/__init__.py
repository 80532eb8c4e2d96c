"""`make bench`: measures the daemon beside nginx, docker-registry and skopeo in the same run.

This is a benchmark, not a test: it reports figures, and fails only if a server returns a wrong response. Its parts:

- `testbed` starts the servers, each in processes of its own: the upstream registry (an nginx with the files of
  `content`), the `daemon`, and the peers that it is compared with (`nginx`, `docker_registry`).
- `hits`, `misses`, `requests`, `footprint`, `image` and `push` contain the benchmarks. Each is a function that puts
  loads on the servers, one after the other in every round, with the helpers in `measurement`.
- The load comes from the `generator`, which is written in C. If a client need not be fast, the load is a job in `loads`
  that several processes of `clients` run at the same time.
- `servers` reads from /proc the resources that a server's processes used under the load.
- `table` computes the medians of the rounds and prints them. `performance_targets` compares them with their targets.
  `document` puts both into docs/performance.md.

Compare CPU times first: they stay valid if the machine is busy, and if the clients are slower than the server.

There are two more programs. `make soak` runs `soak`, which watches the memory and the descriptors of a daemon while
`soak_clients` use it. `make profile` runs `profile`, which samples the daemon's CPU time with perf.
"""

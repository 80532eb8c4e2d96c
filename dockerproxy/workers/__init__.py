"""The daemon as several processes, one for each core.

The first process is the daemon as it would be alone: it listens, administers, collects, and serves. The others, the
*workers*, are started for it as copies of what it was itself before it served (`forking`). It hands each of them
connections it has accepted (`passing`), always to whoever has the fewest (`tally`); nothing is read from a connection
before. What of a process's state concerns the others is in the first one, which is asked over a `line` of its own to
each worker: how much room the cache has, and whose turn it is to change a repository (`desk`; the worker's end is
`elsewhere`). It also passes on what one of them finds out about a client's token. All else they share by the files of
the store, a download by its ingest file.

A worker that dies is replaced (`crew`). Where the first process dies, its workers end. Where the fork server dies, all
others go on, and those who die then are not replaced.
"""

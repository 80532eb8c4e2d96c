"""On-disk storage: one directory tree (`layout`) that serves both the bounded cache and the durable hosted registry.

Both use `blobs` (files by digest; a manifest is a blob too) and `links` (which repository has which blobs). Both use
`blob_reader`, which sends a blob to a client. The cache adds `ingest` (a blob that is being downloaded) and `records`
(small JSON documents). `lru_index` and `eviction` choose the blobs to evict; they do not touch the disk.

The hosted registry adds `uploads` (blobs that are being pushed) and `referrers` (the index behind the referrers API).
`hosted_tree` combines its parts. `sweep` collects garbage: `mark` finds the reachable blobs, `safe_delete` deletes
the others. `scrub` verifies the store, and `importer` imports the directory of another registry. All three are plain
loops that run in a process of their own (`dockerproxy.operations`) and report their `progress`. Walks in the daemon run
beside requests, in a thread that pauses often (`cooperative`).

All writes go through `files`, which writes a staged file and renames it. Neither a reader nor a crash ever sees a
partial file.

A function documented as blocking may wait for the disk, so call it in a thread. The others make one or two system
calls on paths that are in use, and may be called in the reactor's thread.
"""

"""What is kept on disk: one tree (`layout`), used twice - as the bounded cache and as the durable hosted registry.

`blobs` holds contents by digest, `links` says which repository may serve which of them, `ingest` is a blob under way,
`records` are small remembered facts. `eviction` and `usage` decide what goes when the cache is full; they touch no
disk.
The hosted registry alone has `uploads`, blobs that are being pushed, and `referrers`, an index of what refers to what;
`hosting` holds its parts together. `sweep` collects its garbage - what to keep is found by `survey`, and what goes is
taken away by `removal` - `check` verifies it, and `importing` takes over another's directory; all three work beside
requests, in `slices`.
All writes go through `files`: written beside, then renamed, so that no reader and no crash meets half of anything.

What is said to block does disk I/O that can wait and belongs in a thread. The rest is a system call or two on names
that are in use, and may be called from the reactor.
"""

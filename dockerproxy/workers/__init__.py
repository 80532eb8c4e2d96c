"""The processes of the daemon: the main process, the fork server, and the workers, one process for each core.

The main process is the complete daemon: it listens, serves clients, serves the command `dockerproxy` and evicts blobs.
With WORKERS=1 it is the only process. The *workers* only serve clients. The fork server is a copy of the main process
from before it served clients, and forks the workers (`fork_server`). The main process accepts every connection and
passes it, unread, to the process with the fewest open connections (`dispatch`, `scoreboard`).

State that concerns several processes is in the main process: the space of the cache, and the locks of repositories
(`coordinator`). A worker accesses it by RPC (`remote`, `rpc`) over a socket pair (`message_socket`). The main process
also forwards news from one worker to the others: token bindings, and silent servers. All other state is shared through
the files of the store; a download is shared through its ingest file.

If a worker dies, the main process starts another one (`supervisor`). If the main process dies, its workers exit. If the
fork server dies, the other processes continue, but workers that die are not replaced until the daemon is restarted.
"""

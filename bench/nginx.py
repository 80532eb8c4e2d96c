"""Debian's nginx: the registry that is pulled from, and what the daemon is measured against."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.pki import Certificate
from bench.servers import BenchError, Cores, Server

# Debian's nginx.conf has sendfile and tcp_nopush on, too. The daemon ends no connection for the number of its requests,
# so nginx shall not do so either.
_CONFIGURATION = """\
daemon off;
{user}
worker_processes {workers};
worker_rlimit_nofile 8192;
pid nginx.pid;
error_log error.log warn;
events {{ worker_connections 4096; }}
http {{
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    access_log off;
    log_format bytes $body_bytes_sent;
    keepalive_timeout 300s;
    keepalive_requests 1000000000;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    proxy_cache_path cache levels=1:2 keys_zone=blobs:1m max_size=100g inactive=1h use_temp_path=off;
{servers}
}}
"""

_STATIC = """\
    server {{
        listen 127.0.0.1:{port}{tls};
        root {root};
        access_log {log};
    }}
"""

# As much of a registry as who pulls asks for. `limit_rate` holds for each request.
_ORIGIN = """\
    server {{
        listen 127.0.0.1:{port} ssl;
        root {root};
        access_log bytes.log bytes;
        location = /v2/ {{ access_log off; return 200 "{{}}"; }}
        location ~ /manifests/ {{ default_type {manifest}; }}
        location /v2/{slow}/ {{ limit_rate {rate}; }}
    }}
"""

# What caches a registry with nginx: TLS on both sides, verified, one request upstream for all who ask. The default
# buffers of 4 KiB would cost it a quarter more CPU time.
_CACHING = """\
    server {{
        listen 127.0.0.1:{port} ssl;
        location / {{
            proxy_pass https://127.0.0.1:{upstream};
            proxy_http_version 1.1;
            proxy_set_header Host {host};
            proxy_set_header Connection "";
            proxy_ssl_name {host};
            proxy_ssl_server_name on;
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate {ca};
            proxy_buffer_size 64k;
            proxy_buffers 16 64k;
            proxy_busy_buffers_size 128k;
            proxy_cache blobs;
            proxy_cache_valid 200 1h;
            proxy_cache_lock on;
            proxy_cache_lock_age 300s;
            proxy_cache_lock_timeout 300s;
        }}
    }}
"""


def static(port: int, root: Path, log: str = "off", *, tls: bool = True) -> str:
    """Return a server of the files below `root`; `log` is what nginx's `access_log` takes."""
    return _STATIC.format(port=port, tls=" ssl" if tls else "", root=root, log=log)


def origin(port: int, root: Path, manifest: str, slow: str, rate: int) -> str:
    """Return a registry of the files below `root`, which notes the bytes of every body in `bytes.log`.

    Manifests have the media type `manifest`. The repository `slow` sends `rate` bytes a second.
    """
    return _ORIGIN.format(port=port, root=root, manifest=manifest, slow=slow, rate=rate)


def caching(port: int, upstream: int, host: str, ca_file: Path) -> str:
    """Return a server that fetches from `host`, at the port `upstream` here, and caches below `cache`."""
    return _CACHING.format(port=port, upstream=upstream, host=host, ca=ca_file)


def nginx(
    folder: Path,
    certificate: Certificate,
    servers: Sequence[str],
    ports: Sequence[int],
    *,
    workers: int = 1,
    cores: Cores | None = None,
) -> Server:
    """Return an nginx that is not started yet."""
    folder.mkdir(parents=True, exist_ok=True)
    configuration = _CONFIGURATION.format(
        # As root it would hand its worker to a user who cannot read our files.
        user="user root;" if os.geteuid() == 0 else "",
        workers=workers,
        certificate=certificate.file,
        key=certificate.key_file,
        servers="".join(servers),
    )
    (folder / "nginx.conf").write_text(configuration)
    argv = [_program(), "-p", str(folder), "-e", "error.log", "-c", "nginx.conf"]
    return Server(argv, folder, dict(os.environ), ports, workers=workers, cores=cores)


def version() -> str:
    """Return the versions of nginx and of the OpenSSL that it runs with."""
    text = subprocess.run([_program(), "-V"], stderr=subprocess.PIPE, check=True, text=True).stderr
    found = re.search(r"nginx/(\S+)", text)
    library = re.search(r"running with OpenSSL (\S+)", text) or re.search(r"built with OpenSSL (\S+)", text)
    return f"nginx {found[1] if found else '?'} (OpenSSL {library[1] if library else '?'})"


def _program() -> str:
    # Debian puts it where only root looks.
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if found is None:
        raise BenchError("nginx is missing: the Debian package nginx-light has it.")
    return found

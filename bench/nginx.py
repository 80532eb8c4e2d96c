"""Debian's nginx: the registry that is pulled from, and what the daemon is measured against."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.pki import ServerCertificate
from bench.servers import BenchError, BenchServer, CoreAssignment

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

_STATIC_SERVER = """\
    server {{
        listen 127.0.0.1:{port}{tls};
        root {root};
        access_log {log};
    }}
"""

# As much of a registry as who pulls asks for. `limit_rate` holds for each request.
_ORIGIN_SERVER = """\
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
_CACHING_SERVER = """\
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


def static_server(port: int, root: Path, log: str = "off", *, tls: bool = True) -> str:
    """Return a server of the files below `root`; `log` is what nginx's `access_log` takes."""
    return _STATIC_SERVER.format(port=port, tls=" ssl" if tls else "", root=root, log=log)


def origin_server(port: int, root: Path, manifest_type: str, slow_repository: str, slow_rate: int) -> str:
    """Return a registry of the files below `root`, which notes the bytes of every body in `bytes.log`.

    Manifests have the media type `manifest`. The repository `slow` sends `rate` bytes a second.
    """
    return _ORIGIN_SERVER.format(port=port, root=root, manifest=manifest_type, slow=slow_repository, rate=slow_rate)


def caching_server(port: int, upstream: int, host: str, ca_file: Path) -> str:
    """Return a server that fetches from `host`, at the port `upstream` here, and caches below `cache`."""
    return _CACHING_SERVER.format(port=port, upstream=upstream, host=host, ca=ca_file)


def make_nginx(
    folder: Path,
    certificate: ServerCertificate,
    servers: Sequence[str],
    ports: Sequence[int],
    *,
    workers: int = 1,
    cores: CoreAssignment | None = None,
) -> BenchServer:
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
    argv = [_find_program(), "-p", str(folder), "-e", "error.log", "-c", "nginx.conf"]
    return BenchServer(argv, folder, dict(os.environ), ports, workers=workers, cores=cores)


def version() -> str:
    """Return the versions of nginx and of the OpenSSL that it runs with."""
    output = subprocess.run([_find_program(), "-V"], stderr=subprocess.PIPE, check=True, text=True).stderr
    version_match = re.search(r"nginx/(\S+)", output)
    openssl_match = re.search(r"running with OpenSSL (\S+)", output) or re.search(r"built with OpenSSL (\S+)", output)
    return f"nginx {version_match[1] if version_match else '?'} (OpenSSL {openssl_match[1] if openssl_match else '?'})"


def _find_program() -> str:
    # Debian puts it where only root looks.
    path = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if path is None:
        raise BenchError("nginx is missing: the Debian package nginx-light has it.")
    return path

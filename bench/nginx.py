"""Debian's nginx: as the upstream registry, and as the peer of the daemon."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.pki import ServerCertificate
from bench.servers import BenchServer, CoreAssignment, find_program

# sendfile and tcp_nopush are on in Debian's nginx.conf, too. keepalive_requests is huge because the daemon does not
# limit the number of requests on a connection either.
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

# The part of a registry that pulls use. `limit_rate` applies to each request.
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

# A caching proxy for a registry: TLS on both sides, verified, and one upstream request for all clients. With the
# default buffers of 4 KiB nginx would need a quarter more CPU time.
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
    """Return the configuration of a server for the files below `root`; `log` is the argument of `access_log`."""
    return _STATIC_SERVER.format(port=port, tls=" ssl" if tls else "", root=root, log=log)


def origin_server(port: int, root: Path, manifest_type: str, slow_repository: str, slow_rate: int) -> str:
    """Return the configuration of a registry for the files below `root`. It logs the size of every body in `bytes.log`.

    Manifests have the media type `manifest_type`. `slow_repository` is sent at `slow_rate` bytes a second.
    """
    return _ORIGIN_SERVER.format(port=port, root=root, manifest=manifest_type, slow=slow_repository, rate=slow_rate)


def caching_server(port: int, upstream: int, host: str, ca_file: Path) -> str:
    """Return the configuration of a server that fetches from `host` at port `upstream`, and caches below `cache`."""
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
        # Started by root, nginx would run its worker as a user without access to our files.
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
    """Return the versions of nginx and of its OpenSSL."""
    output = subprocess.run([_find_program(), "-V"], stderr=subprocess.PIPE, check=True, text=True).stderr
    version_match = re.search(r"nginx/(\S+)", output)
    openssl_match = re.search(r"running with OpenSSL (\S+)", output) or re.search(r"built with OpenSSL (\S+)", output)
    return f"nginx {version_match[1] if version_match else '?'} (OpenSSL {openssl_match[1] if openssl_match else '?'})"


def _find_program() -> str:
    return find_program("nginx", "nginx-light")

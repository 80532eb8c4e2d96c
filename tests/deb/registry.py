#!/usr/bin/env python3
"""An upstream registry with images generated in memory, some of which it sends slowly. Usage: registry.py PORT [PEM]

PEM has a key and a certificate, with which it speaks TLS.
GET /log returns the requests so far, one per line. It gives a token to everybody, and asks nobody for one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import ssl
import sys
import tarfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
SLOW_RATE = 2_000_000  # bytes per second for slow images
CHUNK_SIZE = 65536


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class GeneratedImage:
    """An image with one layer, which contains one file of `size` random bytes."""

    def __init__(self, name: str, size: int) -> None:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(random.Random(name).randbytes(size)))
        compressed = gzip.compress(layer.getvalue(), compresslevel=1, mtime=0)
        rootfs = {"type": "layers", "diff_ids": [digest(layer.getvalue())]}
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
        content = {"config": ("container.image.v1+json", config), "layers": ("image.rootfs.diff.tar.gzip", compressed)}
        descriptors = {
            key: {"mediaType": f"application/vnd.docker.{kind}", "size": len(data), "digest": digest(data)}
            for key, (kind, data) in content.items()
        }
        descriptors["layers"] = [descriptors["layers"]]  # type: ignore[assignment]
        self.manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, **descriptors}).encode()
        self.blobs = {digest(config): config, digest(compressed): compressed}


IMAGES = {
    "team/hello": GeneratedImage("hello", 100_000),
    **{f"team/slow{i}": GeneratedImage(f"slow{i}", 24 << 20) for i in (1, 2, 3)},
}
REQUEST_LOG: list[str] = []


class RegistryRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        REQUEST_LOG.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        match = re.fullmatch(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)", self.path)
        image = IMAGES.get(match["name"]) if match else None
        if self.path in ("/v2/", "/log"):
            self.respond("\n".join(REQUEST_LOG).encode() if self.path == "/log" else b"{}", "application/json")
        elif self.path.startswith("/token?"):
            self.respond(b'{"token": "of-nobody"}', "application/json")
        elif match and image and match["kind"] == "manifests" and match["reference"] in ("1", digest(image.manifest)):
            self.respond(image.manifest, MANIFEST)
        elif match and image and match["reference"] in image.blobs:
            self.respond(image.blobs[match["reference"]], "application/octet-stream", slow="slow" in match["name"])
        else:
            self.respond(b'{"errors":[{"code":"NAME_UNKNOWN"}]}', "application/json", 404)

    do_HEAD = do_GET

    def respond(self, data: bytes, media_type: str, status: int = 200, *, slow: bool = False) -> None:
        range_match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(range_match[1]) if range_match else 0
        self.send_response(206 if range_match else status)
        if range_match:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", media_type)
        self.send_header("Docker-Content-Digest", digest(data))
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            for position in range(start, len(data), CHUNK_SIZE):
                self.wfile.write(data[position : position + CHUNK_SIZE])
                time.sleep(CHUNK_SIZE / SLOW_RATE if slow else 0)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("", int(sys.argv[1])), RegistryRequestHandler)
    if sys.argv[2:]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[2])
        # The handshake is left to the thread of each connection: one that never ends would keep all others out.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()

#!/usr/bin/env python3
"""A registry elsewhere: images made in memory, of which some come slowly. Usage: registry.py PORT

GET /log returns the requests so far, one a line.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import re
import sys
import tarfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
RATE = 2_000_000  # bytes a second of the slow ones
PIECE = 65536


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Image:
    """An image of one layer, whose one file has `size` random bytes."""

    def __init__(self, name: str, size: int) -> None:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(random.Random(name).randbytes(size)))
        packed = gzip.compress(layer.getvalue(), compresslevel=1, mtime=0)
        rootfs = {"type": "layers", "diff_ids": [digest(layer.getvalue())]}
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
        parts = {"config": ("container.image.v1+json", config), "layers": ("image.rootfs.diff.tar.gzip", packed)}
        described = {
            part: {"mediaType": f"application/vnd.docker.{kind}", "size": len(data), "digest": digest(data)}
            for part, (kind, data) in parts.items()
        }
        described["layers"] = [described["layers"]]  # type: ignore[assignment]
        self.manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, **described}).encode()
        self.blobs = {digest(config): config, digest(packed): packed}


IMAGES = {"team/hello": Image("hello", 100_000), **{f"team/slow{i}": Image(f"slow{i}", 24 << 20) for i in (1, 2, 3)}}
LOG: list[str] = []


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        LOG.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        found = re.fullmatch(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs)/(?P<reference>[^/]+)", self.path)
        image = IMAGES.get(found["name"]) if found else None
        if self.path in ("/v2/", "/log"):
            self.answer("\n".join(LOG).encode() if self.path == "/log" else b"{}", "application/json")
        elif found and image and found["kind"] == "manifests" and found["reference"] in ("1", digest(image.manifest)):
            self.answer(image.manifest, MANIFEST)
        elif found and image and found["reference"] in image.blobs:
            self.answer(image.blobs[found["reference"]], "application/octet-stream", slow="slow" in found["name"])
        else:
            self.answer(b'{"errors":[{"code":"NAME_UNKNOWN"}]}', "application/json", 404)

    do_HEAD = do_GET

    def answer(self, data: bytes, kind: str, status: int = 200, *, slow: bool = False) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else status)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Type", kind)
        self.send_header("Docker-Content-Digest", digest(data))
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            for position in range(start, len(data), PIECE):
                self.wfile.write(data[position : position + PIECE])
                time.sleep(PIECE / RATE if slow else 0)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(sys.argv[1])), Answer).serve_forever()

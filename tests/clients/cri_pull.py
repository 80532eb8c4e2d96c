"""PullImage of the Kubernetes Container Runtime Interface: cri_pull.py SOCKET IMAGE [USER PASSWORD]

It runs in the tree of a Debian release, which has gRPC but no crictl. The messages are written by hand (runtime/v1,
api.proto): PullImageRequest has an ImageSpec (1) with the image (1), and an AuthConfig (2) with user (1), password (2).
"""

import sys

import grpc


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field of Protocol Buffers."""
    length, encoded = len(content), b""
    while length > 127:
        encoded += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([length]) + content


def main() -> None:
    """Pull the image; exit with a message if that fails."""
    socket, image, *login = sys.argv[1:]
    request = field(1, field(1, image.encode()))
    if login:
        request += field(2, b"".join(field(number, text.encode()) for number, text in enumerate(login, 1)))
    channel = grpc.insecure_channel(f"unix://{socket}", options=[("grpc.enable_http_proxy", 0)])
    pull = channel.unary_unary("/runtime.v1.ImageService/PullImage", bytes, bytes)
    try:
        pull(request, timeout=100, wait_for_ready=True)
    except grpc.RpcError as error:
        sys.exit(f"{error.code()}: {error.details()}")


if __name__ == "__main__":
    main()

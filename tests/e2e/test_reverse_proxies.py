"""The hosted registry behind nginx and Caddy, configured as docs/settings.md says, with skopeo and docker."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest
from attrs import frozen

from bench.servers import free_port, is_listening
from tests.e2e.harness import images
from tests.e2e.harness.client_factory import ClientFactory, ProcessGroup
from tests.e2e.harness.clients import Skopeo, check_output
from tests.e2e.harness.http_client import BufferedResponse, basic_authorization, read_response, request_directly
from tests.e2e.harness.pki import Leaf, UpstreamCA
from tests.e2e.harness.process import BackgroundProcess, require_programs, wait_until
from tests.e2e.harness.recording_proxy import RecordingProxy
from tests.e2e.harness.registry_daemon import (
    HOSTED_REGISTRY_HOST,
    USERS,
    RegistryDaemon,
    write_htpasswd,
    write_image_folder,
)
from tests.e2e.harness.upstreams import Upstreams

NAME = "reg.example.com"
DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"
MIB = 1024 * 1024
PASSWORD = USERS["alice"]


def documented(language: str) -> str:
    """Return the block of docs/settings.md that is marked with `language`."""
    match = re.search(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert match is not None
    return match[1]


def replaced(text: str, *replacements: tuple[str, str]) -> str:
    """Return `text` with each of `replacements` made. Each must occur."""
    for old, new in replacements:
        assert old in text, f"{old} is not in the document"
        text = text.replace(old, new)
    return text


class ReverseProxy(BackgroundProcess):
    """A reverse proxy that ends TLS on `port` and passes requests on to a port of the daemon."""

    def __init__(self, program: str, folder: Path, leaf: Leaf, upstream_port: int) -> None:
        require_programs(program, root=True)
        folder.mkdir()
        self.port = free_port()
        upstream = ("127.0.0.1:5000", f"127.0.0.1:{upstream_port}")
        if program == "nginx":
            server = replaced(
                documented("nginx"),
                ("listen 443 ssl", f"listen 127.0.0.1:{self.port} ssl"),
                ("/etc/ssl/reg.example.com/fullchain.pem", str(leaf.certificate_file)),
                ("/etc/ssl/reg.example.com/privkey.pem", str(leaf.key_file)),
                upstream,
            )
            temporary = "".join(
                f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            )
            configuration = (
                f"daemon off;\nuser root;\npid {folder}/pid;\nerror_log stderr warn;\nevents {{}}\n"
                f"http {{\naccess_log {folder}/access.log;\n{temporary}{server}}}\n"
            )
            argv = ["nginx", "-e", "stderr", "-c", str(folder / "configuration")]
        else:
            site = replaced(
                documented("caddyfile"),
                (f"{NAME} {{", f"https://{NAME}:{self.port} {{\n    tls {leaf.certificate_file} {leaf.key_file}"),
                upstream,
            )
            configuration = f"{{\n    admin off\n    auto_https disable_redirects\n}}\n{site}"
            argv = ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "configuration")]
        (folder / "configuration").write_text(configuration)
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder)}
        super().__init__(argv, folder / "output", environment, folder)

    def start(self) -> None:
        self.launch()
        self.wait_until_ready(lambda: is_listening(self.port))


@frozen
class Site:
    """A daemon with users behind a reverse proxy, and the network of its clients, which knows its public name."""

    daemon: RegistryDaemon
    proxy: ReverseProxy
    network: RecordingProxy
    ca: UpstreamCA

    @property
    def client_environment(self) -> dict[str, str]:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        url = f"http://127.0.0.1:{self.network.port}"
        return {**dict.fromkeys(names, url), "SSL_CERT_FILE": str(self.ca.ca_file)}

    def request(self, target: str, method: str = "GET", source: str = "127.0.0.1", **headers: str) -> BufferedResponse:
        """Send a request to the public URL, from the address `source`. Underscores in names become dashes."""
        fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        with socket.create_connection(("127.0.0.1", self.proxy.port), 20, (source, 0)) as tcp:
            with self.ca.client_context().wrap_socket(tcp, server_hostname=NAME) as tls:
                tls.sendall(f"{method} {target} HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 0\r\n{fields}\r\n".encode())
                response = HTTPResponse(tls)
                response.begin()
                return read_response(response)


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def site(
    request: pytest.FixtureRequest, upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(request.param)
    ca = UpstreamCA(folder / "pki", "a public CA")
    environment = dict(line.split("=", 1) for line in documented("sh").split())
    assert environment.pop("REGISTRY_HTTP_LISTEN") == "tcp:5000:interface=127.0.0.1"
    settings = {
        **upstreams.settings,
        **environment,
        "HTPASSWD_FILE": str(write_htpasswd(folder)),
        "ANONYMOUS_PULL": "true",
        "ALLOW_CLIENTS": "127.0.0.0/24",
        "WORKERS": "2",
    }
    daemon = RegistryDaemon(folder / "daemon", settings)
    proxy = ReverseProxy(request.param, folder / "proxy", ca.leaf(NAME), daemon.http_port)
    group = ProcessGroup()
    group.add(proxy)
    network = RecordingProxy({f"{NAME}:443": proxy.port, f"{NAME}:80": daemon.http_port})
    network.start()
    try:
        proxy.start()
        with daemon.run_and_check_log(lambda: [*upstreams.secrets, *USERS.values()]):
            yield Site(daemon, proxy, network, ca)
    finally:
        group.stop()
        network.stop()


def assert_only_tls(site: Site) -> None:
    """Check that no request of the clients left TLS, so that no password did."""
    assert set(site.network.connected_targets) == {f"{NAME}:443"}
    assert all(head.startswith(b"CONNECT ") and b"uthorization" not in head for head in site.network.request_heads)


def test_skopeo_pushes_and_pulls(site: Site, tmp_path: Path) -> None:
    image = images.build_small_image("reverse-proxy", size=3 * MIB)
    folder = write_image_folder(image, tmp_path / "image")
    skopeo = Skopeo(tmp_path / "skopeo", site.client_environment)
    target = f"docker://{NAME}/team/app:1"
    assert skopeo.run("copy", f"dir:{folder}", target).returncode != 0
    check_output(skopeo.run("copy", f"--dest-creds=alice:{PASSWORD}", f"dir:{folder}", target))
    assert skopeo.inspect_raw(f"{NAME}/team/app:1") == image.manifest.data
    skopeo.pull(f"{NAME}/team/app:1")
    assert_only_tls(site)


def test_docker_logs_in_and_pushes(site: Site, clients: ClientFactory, tmp_path: Path) -> None:
    image = images.build_small_image("reverse-proxy-docker", oci=False, size=5 * MIB)
    skopeo = Skopeo(tmp_path / "skopeo", site.client_environment)
    folder = write_image_folder(image, tmp_path / "image")
    check_output(skopeo.run("copy", f"--dest-creds=alice:{PASSWORD}", f"dir:{folder}", f"docker://{NAME}/docker/app:1"))
    docker = clients.docker_with(site.client_environment)
    assert docker.run("login", "-u", "alice", "-p", "wrong", NAME).returncode != 0
    docker.run_checked("login", "-u", "alice", "-p", PASSWORD, NAME)
    docker.run_checked("pull", f"{NAME}/docker/app:1")
    docker.run_checked("tag", f"{NAME}/docker/app:1", f"{NAME}/docker/other:1")
    docker.run_checked("push", f"{NAME}/docker/other:1")
    assert "buffered to a temporary file" not in site.proxy.output_text  # as nginx warns
    assert_only_tls(site)


def test_the_challenge_and_all_locations_lead_to_the_public_url(site: Site) -> None:
    response = site.request("/v2/")
    assert response.status == 401
    assert response.headers["www-authenticate"].startswith(f'Bearer realm="https://{NAME}/v2/token",')
    authorization = basic_authorization("alice", PASSWORD)
    upload = site.request("/v2/locations/app/blobs/uploads/", "POST", Authorization=authorization)
    assert (upload.status, upload.headers["location"][:4]) == (202, "/v2/")
    # containerd adds the name to which the image belongs if it has the address of another server for it.
    assert site.request(f"/v2/_catalog?ns={NAME}").status == 200
    # A page that the browser shows under the public name may read; one of another site may not.
    own = site.request("/v2/_catalog", Origin=f"https://{NAME}", Sec_Fetch_Site="same-origin")
    foreign = site.request("/v2/_catalog", Origin="https://evil.example", Sec_Fetch_Site="cross-site")
    assert (own.status, foreign.status) == (200, 403)


def logged_clients(site: Site, offset: int) -> set[str]:
    return {entry.client for entry in site.daemon.access_log(offset)}


@pytest.mark.parametrize("family", ["X-Forwarded", "Forwarded"])
def test_no_client_chooses_its_address(site: Site, family: str) -> None:
    claims = {
        "X-Forwarded": {
            "X_Forwarded_For": "127.0.0.9",
            "X_Forwarded_Proto": "http",
            "X_Forwarded_Host": "evil.example",
        },
        "Forwarded": {"Forwarded": "for=127.0.0.9;proto=http;host=evil.example"},
    }[family]
    offset = site.daemon.log_offset()
    response = site.request("/v2/", source="127.0.0.7", **claims)
    assert response.headers["www-authenticate"].startswith(f'Bearer realm="https://{NAME}/v2/token",')
    refused = site.request("/v2/", source="127.0.1.7", **claims)
    assert (refused.status, b"ALLOW_CLIENTS" in refused.body, b"127.0.1.7" in refused.body) == (403, True, True)
    # Lines about the requests of other tests may be written as late as now.
    wait_until(lambda: {"127.0.0.7", "127.0.1.7"} <= logged_clients(site, offset), "the log has both clients")
    assert "127.0.0.9" not in logged_clients(site, offset)


def test_a_client_without_the_reverse_proxy_stays_there(site: Site) -> None:
    response = site.daemon.client.get(f"https://{HOSTED_REGISTRY_HOST}/v2/", X_Forwarded_For="10.0.0.9")
    assert f'realm="https://{HOSTED_REGISTRY_HOST}/v2/token"' in response.headers["www-authenticate"]
    # Even from the address of the reverse proxy, the proxy port believes nothing; its client is allowed by itself.
    offset = site.daemon.log_offset()
    site.daemon.client.get(f"https://{HOSTED_REGISTRY_HOST}/v2/stays/tags/list", X_Forwarded_For="198.51.100.7")
    wait_until(lambda: "/v2/stays/tags/list" in site.daemon.output_text[offset:], "the request is logged")
    assert logged_clients(site, offset) == {"127.0.0.1"}
    direct = request_directly("GET", f"http://{site.daemon.http_address}/v2/", {"Host": NAME})
    assert f'realm="https://{NAME}/v2/token"' in direct.headers["www-authenticate"]


def test_a_rebound_name_is_refused_over_plain_http(site: Site) -> None:
    url = f"http://{site.daemon.http_address}/v2/"
    assert request_directly("GET", url, {"Host": "evil.example"}).status == 421
    assert request_directly("GET", url, {"Host": NAME}).status == 401


def test_without_a_public_url_a_trusted_proxy_names_it(upstreams: Upstreams, tmp_path: Path) -> None:
    """This test takes the part of the reverse proxy. REGISTRY_URL is set by a reload."""
    env_file = tmp_path / "env"
    env_file.write_text("")
    settings = {
        **upstreams.settings,
        "HTPASSWD_FILE": str(write_htpasswd(tmp_path)),
        "ANONYMOUS_PULL": "true",
        "TRUSTED_PROXIES": "127.0.0.1",
        "WORKERS": "2",
    }
    daemon = RegistryDaemon(tmp_path / "daemon", settings)
    daemon.argv += ["--env-file", str(env_file)]

    def challenge(source: str, **fields: str) -> str:
        """Return the status, or the realm of the 401, of a request from the address `source`."""
        with socket.create_connection(("127.0.0.1", daemon.http_port), 20, (source, 0)) as sock:
            lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
            sock.sendall(f"GET /v2/ HTTP/1.1\r\n{lines}\r\n".encode())
            response = HTTPResponse(sock)
            response.begin()
            realm = re.search('realm="(.*?)/v2/token"', response.headers["WWW-Authenticate"] or "")
            return realm[1] if realm is not None else str(response.status)

    with daemon.run_and_check_log(lambda: upstreams.secrets):
        tls = {"Host": NAME, "X_Forwarded_Proto": "https"}
        assert challenge("127.0.0.1", **tls) == f"https://{NAME}"
        assert (
            challenge("127.0.0.1", Host="inner:80", Forwarded=f'proto=https;host="{NAME}:8443"')
            == f"https://{NAME}:8443"
        )
        assert challenge("127.0.0.5", **tls) == "421"  # it is plain HTTP, with a name that anybody can have
        assert challenge("127.0.0.1", Host=NAME, X_Forwarded_Proto="http") == "421"
        assert challenge("127.0.0.1", Host=NAME, X_Forwarded_Proto="gopher") == "400"
        env_file.write_text(f"REGISTRY_URL=https://{NAME}\n")
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: "reloaded: serving" in daemon.output_text, "the reload")
        for _ in range(4):  # in each process
            assert challenge("127.0.0.5", Host=NAME) == f"https://{NAME}"
            assert challenge("127.0.0.5", Host="evil.example") == "421"
        env_file.write_text("REGISTRY_URL=https://user:secret-word@reg.example.com/x\n")
        daemon.send_signal(signal.SIGHUP)
        wait_until(lambda: "not reloaded" in daemon.output_text, "the refusal")
        assert "secret-word" not in daemon.output_text
        assert challenge("127.0.0.5", Host=NAME) == f"https://{NAME}"

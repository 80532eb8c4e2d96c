"""The daemon as the mirror of podman, buildah and skopeo, which name a registry in the location of its mirror only."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import http_client, images
from tests.e2e.harness.client_factory import ClientFactory
from tests.e2e.harness.clients import Podman, Skopeo, check_output
from tests.e2e.harness.images import ACCEPT_MANIFESTS, SampleImage
from tests.e2e.harness.registry_daemon import RegistryDaemon, write_image_folder
from tests.e2e.harness.upstreams import Upstreams

README = Path(__file__).parents[2] / "README.md"


def documented(language: str, daemon: RegistryDaemon) -> list[str]:
    """Return the README's recipes for mirrors in `language`, with the daemon's address, and fake.test for quay.io."""
    section = README.read_text().partition("### As a mirror")[2].partition("\n### ")[0]
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert blocks and all("docker-registry.local:3128" in block for block in blocks)
    address = f"127.0.0.1:{daemon.port}"
    return [block.replace("docker-registry.local:3128", address).replace("quay.io", "fake.test") for block in blocks]


@pytest.fixture(scope="module")
def daemon(upstreams: Upstreams, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryDaemon]:
    registry_daemon = RegistryDaemon(tmp_path_factory.mktemp("mirroring"), upstreams.settings)
    with registry_daemon.run_and_check_log(lambda: upstreams.secrets):
        yield registry_daemon


@pytest.fixture(params=["podman", "buildah", "skopeo"])
def make_client(request: pytest.FixtureRequest, clients: ClientFactory) -> object:
    """Return a function that returns a client with empty storage, which reaches only what is on this machine."""
    return getattr(clients, f"{request.param}_without_proxy")


def check_pull(client: Podman | Skopeo, reference: str, image: SampleImage) -> None:
    """Pull `reference`, and check that it is `image`."""
    if isinstance(client, Podman):
        image_id = check_output(client.run("pull", "-q", reference)).strip().removeprefix("sha256:")
        assert image_id == image.blobs[0].digest.removeprefix("sha256:")
    else:
        assert (client.pull(reference) / "manifest.json").read_bytes() == image.manifest.data


def failed_pull(client: Podman | Skopeo, reference: str) -> str:
    """Try to pull `reference`, check that it fails, and return the messages of the client."""
    result = client.run("pull", "-q", reference) if isinstance(client, Podman) else client.try_pull(reference)
    assert result.returncode != 0, result.stdout
    return result.stderr


def put_twins(upstreams: Upstreams, name: str) -> tuple[SampleImage, SampleImage]:
    """Put two images with the same name at Docker Hub and at fake.test, and return them."""
    hub_image = upstreams.push_to_hub(name, "1", images.build_small_image(f"{name}-hub", oci=False))
    other_image = images.build_small_image(f"{name}-other", oci=False)
    upstreams.fake.put(name, "1", other_image)
    return hub_image, other_image


@pytest.mark.parametrize("port", ["proxy", "registry"])
def test_each_registry_sends_its_own_image(
    upstreams: Upstreams, daemon: RegistryDaemon, make_client: type[Podman], port: str
) -> None:
    """Also from the cache, while no upstream can be reached."""
    name = f"library/twin-{port}-{make_client.__name__}".replace("_", "-")
    hub_image, other_image = put_twins(upstreams, name)
    address = f"127.0.0.1:{daemon.port}" if port == "proxy" else daemon.http_address

    def check_pulls() -> None:
        client = make_client()
        for host in ("docker.io", "fake.test"):
            client.configure_mirror(host, f"{address}/{host}")
        check_pull(client, f"fake.test/{name}:1", other_image)
        check_pull(client, f"docker.io/{name}:1", hub_image)
        check_pull(client, f"docker.io/{name.removeprefix('library/')}:1", hub_image)

    check_pulls()
    with upstreams.stopped():
        check_pulls()


def test_recipe_of_the_readme_for_registries_conf(
    upstreams: Upstreams, daemon: RegistryDaemon, make_client: type[Podman]
) -> None:
    name = f"library/recipe-{make_client.__name__}".replace("_", "-")
    hub_image, other_image = put_twins(upstreams, name)
    client = make_client()
    client.configure_registries(documented("toml", daemon)[1])
    check_pull(client, f"fake.test/{name}:1", other_image)
    check_pull(client, f"docker.io/{name}:1", hub_image)


def test_recipes_of_the_readme_for_containerd_and_dockerd(
    upstreams: Upstreams, daemon: RegistryDaemon, clients: ClientFactory
) -> None:
    hub_image, other_image = put_twins(upstreams, "library/recipe")
    containerd = clients.containerd()
    recipe = documented("toml", daemon)[0]
    containerd.configure_host("fake.test", recipe)
    containerd.configure_host("docker.io", recipe.replace("fake.test", "docker.io"))
    for host, image in (("fake.test", other_image), ("docker.io", hub_image)):
        containerd.pull(f"{host}/library/recipe:1")
        assert containerd.image_digest(f"{host}/library/recipe:1") == image.digest
    [recipe] = documented("json", daemon)
    settings = json.loads(recipe)
    docker = clients.docker_with_mirrors(settings.pop("registry-mirrors"), settings.pop("insecure-registries"))
    assert not settings
    docker.run_checked("pull", "recipe:1")
    assert docker.image_digest("recipe:1") == hub_image.digest


def test_a_mirror_without_a_registry_in_its_location_is_refused(
    upstreams: Upstreams, daemon: RegistryDaemon, make_client: type[Podman]
) -> None:
    """Docker Hub's image of the same name would come in place of the other registry's."""
    name = f"library/unnamed-{make_client.__name__}".replace("_", "-")
    hub_image, _ = put_twins(upstreams, name)
    address = f"127.0.0.1:{daemon.port}"
    client = make_client()
    for host in ("docker.io", "fake.test"):
        client.configure_mirror(host, address)
    for host in ("docker.io", "fake.test"):
        assert f'"{address}/quay.io"' in failed_pull(client, f"{host}/{name}:1").replace("\\", "")
    url = f"http://{address}/v2/{name}/manifests/1"  # dockerd and others still get Docker Hub's
    response = http_client.request_directly("GET", url, {"Accept": ACCEPT_MANIFESTS})
    assert response.body == hub_image.manifest.data


def test_a_registry_that_is_not_listed_is_no_other_one(
    upstreams: Upstreams, daemon: RegistryDaemon, make_client: type[Podman]
) -> None:
    name = f"library/unlisted-{make_client.__name__}".replace("_", "-")
    put_twins(upstreams, name)
    client = make_client()
    client.configure_mirror("unlisted.test", f"127.0.0.1:{daemon.port}/unlisted.test")
    assert "'unlisted.test' is not mirrored here" in failed_pull(client, f"unlisted.test/{name}:1")


def test_the_next_page_is_of_the_same_registry(upstreams: Upstreams, daemon: RegistryDaemon) -> None:
    for name in ("paged/a", "paged/b", "paged/c"):
        upstreams.push_to_registry(name, "1", images.build_small_image("paged"))
    for address in (f"127.0.0.1:{daemon.port}", daemon.http_address):
        names: list[str] = []
        target = "/v2/registry.test:5443/_catalog?n=1&last=paged/"
        while target and len(names) < 3:
            response = http_client.request_directly("GET", f"http://{address}{target}")
            names += response.json["repositories"]
            target = response.headers.get("link", "").partition(">")[0].removeprefix("<")
        assert names == ["paged/a", "paged/b", "paged/c"]


def test_repositories_of_the_hosted_registry_keep_their_names(
    upstreams: Upstreams, daemon: RegistryDaemon, clients: ClientFactory, tmp_path: Path
) -> None:
    """New ones cannot be pushed below the name of a mirrored registry: they would take the place of its images."""
    hosted_image = images.build_small_image("hosted-twin", oci=False)
    upstreams.fake.put("old/app", "1", images.build_small_image("upstream-twin", oci=False))
    folder = write_image_folder(hosted_image, tmp_path / "image")
    skopeo = clients.skopeo_without_proxy()
    push = ("copy", "--dest-tls-verify=false", f"dir:{folder}")
    check_output(skopeo.run(*push, f"docker://{daemon.http_address}/my.app/x:1"))
    refusal = skopeo.run(*push, f"docker://{daemon.http_address}/fake.test/old/app:1")
    assert refusal.returncode != 0
    assert "a mirror is read-only" in refusal.stderr or "405" in refusal.stderr
    upstreams.fake.put("only/upstream", "1", hosted_image)
    repositories = daemon.state_folder / "registry" / "docker/registry/v2/repositories"
    shutil.copytree(repositories / "my.app/x", repositories / "fake.test/old/app")
    for name in ("my.app/x", "fake.test/old/app", "fake.test/only/upstream"):
        url = f"http://{daemon.http_address}/v2/{name}/manifests/1"
        response = http_client.request_directly("GET", url, {"Accept": ACCEPT_MANIFESTS})
        assert response.body == hosted_image.manifest.data, name

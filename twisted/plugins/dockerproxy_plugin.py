"""Makes `twistd dockerproxy` known to Twisted."""

from twisted.application.service import ServiceMaker

dockerproxy = ServiceMaker(
    "docker-registry-proxy", "dockerproxy.tap", "Caching proxy for Docker registries", "dockerproxy"
)

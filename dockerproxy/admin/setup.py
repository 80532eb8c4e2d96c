"""The script that sets a client up: what ``curl http://HOST:3128/setup/systemd | sudo sh`` runs."""

from __future__ import annotations

import re
import shlex

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Host


def systemd_script(proxy_url: str) -> str:
    """Return a POSIX shell script that makes this host's dockerd use the proxy at `proxy_url`, and trust its CA.

    `proxy_url` is ``http://host/`` or ``http://host:port/``; anything else raises ValueError. It comes from the request
    of whoever asks, and a script that root runs is made of it.
    """
    written = re.fullmatch(r"http://([^/?#@\\\s]+)/", proxy_url)
    if written is None:
        raise ValueError(f"{proxy_url[:300]!r} is not of the form http://host:port/")
    try:
        host = Host.parse(written[1], default_port=80)
    except NameInvalid as error:
        raise ValueError(error.message) from error
    return _SYSTEMD.replace("@PROXY@", shlex.quote(f"http://{host.authority}/"))


# All of it is functions until the last line, which a shell runs only when it is there to its closing brace: a download
# that breaks off does nothing.
_SYSTEMD = r"""#!/bin/sh
# Makes dockerd on this host pull through the proxy named below, and makes the host trust the proxy's CA certificate.
# Run it as root; run it again at any time: it changes what differs, and restarts docker only if something did.
# With --remove it takes away what it brought.

set -eu
umask 022
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

proxy=@PROXY@
drop_in=/etc/systemd/system/docker.service.d/http-proxy.conf
saved=$drop_in.before-docker-registry-proxy
mark='# Written by the set-up script of docker-registry-proxy.'
never_proxied='localhost,127.0.0.1,::1'
unfinished=/var/lib/docker-registry-proxy-setup.unfinished
changed=

say() {
    printf '%s\n' "$*"
}

fail() {
    printf '%s\n' "Failed: $*" >&2
    exit 1
}

usage() {
    say "Usage: curl -fsS ${proxy}setup/systemd | sudo sh"
    say "       curl -fsS ${proxy}setup/systemd | sudo sh -s -- --remove"
}

# Sets $store, the kind of trust store this system has, and $anchor, where our certificate goes in it.
find_store() {
    if command -v update-ca-trust >/dev/null && [ -d /etc/pki/ca-trust/source/anchors ]; then
        store=fedora
        anchor=/etc/pki/ca-trust/source/anchors/docker_registry_proxy.crt
    elif command -v update-ca-certificates >/dev/null && [ -d /usr/share/ca-certificates ]; then
        store=debian
        anchor=/usr/local/share/ca-certificates/docker_registry_proxy.crt
    elif command -v trust >/dev/null; then
        store=arch
        anchor=/usr/local/share/docker_registry_proxy.crt
    else
        fail 'no trust store as Debian, Alpine, Fedora or Arch have it was found; is ca-certificates installed?'
    fi
}

# Makes the system trust what is at $anchor.
trust_anchor() {
    case $store in
        fedora) update-ca-trust ;;
        debian) update-ca-certificates --fresh >/dev/null ;;
        arch) trust anchor --store "$anchor" ;;
    esac
}

# Makes the system forget what is at $anchor, and takes it away.
forget_anchor() {
    if [ "$store" = arch ]; then
        trust anchor --remove "$anchor" || fail "trust did not remove the certificate at $anchor"
        rm -f "$anchor"
    else
        rm -f "$anchor"
        trust_anchor
    fi
}

# Whether the second file is there and holds the text of the first.
is_same() {
    [ -f "$2" ] && [ "$(cat "$1")" = "$(cat "$2")" ]
}

# Remembers that there is more to do than to put files in place, should this script be stopped half-way.
change() {
    changed=yes
    : >"$unfinished"
}

fetch() {
    if command -v curl >/dev/null; then
        curl -fsSg --max-time 30 -o "$2" "$1"
    elif command -v wget >/dev/null; then
        wget -q -T 30 -O "$2" "$1"
    else
        fail 'neither curl nor wget is installed'
    fi
}

# One PEM certificate and nothing else: not an error page, not half of one.
is_certificate() {
    [ "$(sed -n '1p' "$1")" = '-----BEGIN CERTIFICATE-----' ] || return 1
    [ "$(sed -n '$p' "$1")" = '-----END CERTIFICATE-----' ] || return 1
    sed -n '2p' "$1" | grep -q '^MI' || return 1
    if sed '1d;$d' "$1" | grep -qv '^[A-Za-z0-9+/]\{1,64\}=\{0,2\}$'; then return 1; fi
    if command -v openssl >/dev/null; then openssl x509 -noout -in "$1" 2>/dev/null || return 1; fi
}

install_certificate() {
    fetch "${proxy}ca.crt" "$work/ca.crt" || fail "${proxy}ca.crt cannot be fetched"
    is_certificate "$work/ca.crt" || fail "${proxy}ca.crt is not a certificate; nothing was changed"
    if [ ! -e "$unfinished" ] && is_same "$work/ca.crt" "$anchor"; then
        say "The CA certificate is trusted already: $anchor"
        return
    fi
    change
    [ ! -e "$anchor" ] || forget_anchor
    mkdir -p "${anchor%/*}"
    cp "$work/ca.crt" "$anchor.new"
    mv "$anchor.new" "$anchor"
    trust_anchor || fail 'the system did not take the CA certificate'
    say "The CA certificate is now trusted: $anchor"
}

# The hosts that are not to be proxied: those that the present file names, and those that never are.
no_proxy_list() {
    list=
    if [ -f "$drop_in" ]; then
        list=$(sed -n "s/^Environment=.*NO_PROXY=\([^\"' ]*\).*\$/\1/p" "$drop_in" | tail -n 1)
    fi
    for host in $(printf '%s' "$never_proxied" | tr ',' ' '); do
        case ",$list," in
            *",$host,"*) ;;
            *) list=${list:+$list,}$host ;;
        esac
    done
    printf '%s' "$list"
}

configure_docker() {
    {
        say "$mark"
        say '[Service]'
        say "Environment=\"HTTP_PROXY=$proxy\""
        say "Environment=\"HTTPS_PROXY=$proxy\""
        say "Environment=\"NO_PROXY=$(no_proxy_list)\""
    } >"$work/http-proxy.conf"
    if is_same "$work/http-proxy.conf" "$drop_in"; then
        say "docker is set up already: $drop_in"
        return
    fi
    change
    mkdir -p "${drop_in%/*}"
    if [ -e "$drop_in" ] && ! grep -qxF "$mark" "$drop_in"; then
        mv "$drop_in" "$saved"
        say "The file that was there is kept: $saved"
    fi
    cp "$work/http-proxy.conf" "$drop_in.new"
    mv "$drop_in.new" "$drop_in"
    say "docker is now set up to use $proxy: $drop_in"
}

has_systemd() {
    command -v systemctl >/dev/null && [ -d /run/systemd/system ]
}

restart_docker() {
    if [ -z "$changed" ]; then
        say 'Nothing has changed, so docker was not restarted.'
        return
    fi
    systemctl daemon-reload
    if systemctl is-active --quiet docker.service; then
        systemctl restart docker.service || fail 'docker did not restart; see: journalctl -u docker.service'
        say 'docker was restarted.'
    else
        say 'docker is not running; it will use the new settings when it is started.'
    fi
    rm -f "$unfinished"
}

remove() {
    if [ -e "$anchor" ]; then
        change
        forget_anchor
        say "The CA certificate is no longer trusted: $anchor"
    fi
    if [ -e "$drop_in" ] && grep -qxF "$mark" "$drop_in"; then
        change
        rm -f "$drop_in"
        say "docker no longer uses the proxy: $drop_in"
        if [ -e "$saved" ]; then
            mv "$saved" "$drop_in"
            say "The file that was there before is back: $drop_in"
        fi
        rmdir "${drop_in%/*}" 2>/dev/null || true
    elif [ -e "$drop_in" ]; then
        say "Left alone, not being of this script's making: $drop_in"
    fi
    if has_systemd; then restart_docker; fi
    rm -f "$unfinished"
}

main() {
    case "$*" in
        '' | --remove) ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    [ "$(id -u)" = 0 ] || fail 'this changes the configuration of the system, so it has to be run as root (with sudo)'
    find_store
    if [ "$*" = --remove ]; then
        remove
        exit 0
    fi

    # The proxy is reached directly, whatever proxy this shell is told to use.
    unset http_proxy HTTP_PROXY all_proxy ALL_PROXY
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    install_certificate
    if has_systemd; then
        configure_docker
        restart_docker
    else
        rm -f "$unfinished"
        say "There is no systemd here. Give dockerd this environment yourself, and restart it:"
        say "    HTTP_PROXY=$proxy"
        say "    HTTPS_PROXY=$proxy"
        say "    NO_PROXY=$never_proxied"
        say 'On Alpine, that is a line "export NAME=value" for each in /etc/conf.d/docker.'
        exit 1
    fi
}

{ main "$@"; exit; }
"""

#!/bin/sh
# Makes the container engines on this host pull through the proxy named below, and makes the host trust the proxy's CA
# certificate: dockerd, containerd and CRI-O under systemd or OpenRC, podman; those that are installed, and nothing else.
# Run it as root; run it again at any time: it changes what differs, and restarts only what something changed for.
# With --remove it takes away what it brought.

set -eu
umask 022
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
LC_ALL=C
export LC_ALL

proxy=@PROXY@
mark='# Of the set-up script of docker-registry-proxy. When it is run again, NO_PROXY is kept, and nothing else.'
tail=' # by the set-up script of docker-registry-proxy'
unfinished=/var/lib/docker-registry-proxy-setup.unfinished
probe=/etc/.docker-registry-proxy-setup # not `test -w /etc`: busybox says yes to root on a read-only one
own_name=zz-docker-registry-proxy.conf # read after the files of others, which stay as they are
podman_conf=/etc/containers/containers.conf.d/$own_name
services='containerd docker crio' # in the order of a restart: dockerd needs containerd
pending=                          # the services that something changed for
new=                              # the file that is being written

say() {
    printf '%s\n' "$*"
}

fail() {
    printf '%s\n' "Failed: $*" >&2
    exit 1
}

usage() {
    say "Usage: curl -fsS ${proxy}setup | sudo sh"
    say "       curl -fsS ${proxy}setup | sudo sh -s -- --remove"
}

has() {
    command -v "$1" >/dev/null
}

# Whether the second file is there and holds the text of the first.
is_same() {
    [ -f "$2" ] && [ "$(cat "$1")" = "$(cat "$2")" ]
}

# Remembers that something changed for a service, also if this script is stopped before it restarts it.
change() {
    : >"$unfinished"
    pending="$pending $1"
}

# The same for all of them: each reads the trust store when it starts, and not again.
change_all() {
    change "$services podman"
}

# Gives the second file the text of the first. At no moment is there a part of it; its owner and mode stay.
put() {
    new=$2.new
    {
        mkdir -p "${2%/*}" &&
            if [ -e "$2" ]; then cp -p "$2" "$new"; fi &&
            cat "$1" >"$new" &&
            mv "$new" "$2"
    } || fail "$2 cannot be written"
    new=
}

# The certificate.

# Sets $update, the command that makes the system's trust store anew, and $anchor, where our certificate goes in it.
find_store() {
    if has update-ca-trust && [ -d /etc/pki/ca-trust/source/anchors ]; then # Fedora, RHEL
        update='update-ca-trust'
        anchor=/etc/pki/ca-trust/source/anchors/docker_registry_proxy.crt
    elif has update-ca-trust && [ -d /etc/ca-certificates/trust-source ]; then # Arch
        update='update-ca-trust'
        anchor=/etc/ca-certificates/trust-source/anchors/docker_registry_proxy.crt
    elif has update-ca-certificates && [ -d /usr/share/ca-certificates ]; then # Debian, Ubuntu, Alpine
        update='update-ca-certificates --fresh'
        anchor=/usr/local/share/ca-certificates/docker_registry_proxy.crt
    else
        fail 'no trust store as Debian, Alpine, Fedora or Arch have it was found; is ca-certificates installed?'
    fi
}

update_store() {
    # shellcheck disable=SC2086 # a command and its argument
    if ! $update >"$work/told" 2>&1; then # some warn where nothing is wrong
        cat "$work/told" >&2
        fail "the system's trust store could not be updated: $update"
    fi
}

fetch() {
    if has curl; then
        curl -fsSg --max-time 30 -o "$2" "$1"
    elif has wget; then
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
    if has openssl; then openssl x509 -noout -in "$1" 2>/dev/null || return 1; fi
}

install_certificate() {
    fetch "${proxy}ca.crt" "$work/ca.crt" || fail "${proxy}ca.crt cannot be fetched"
    is_certificate "$work/ca.crt" || fail "${proxy}ca.crt is not a certificate; nothing was changed"
    if [ -z "$pending" ] && is_same "$work/ca.crt" "$anchor"; then
        say "The CA certificate is trusted already: $anchor"
        return
    fi
    change_all
    put "$work/ca.crt" "$anchor"
    update_store
    say "The CA certificate is now trusted: $anchor"
}

remove_certificate() {
    [ -e "$anchor" ] || return 0
    change_all
    rm -f "$anchor"
    update_store
    say "The CA certificate was removed: $anchor"
}

# The engines.

has_systemd() {
    has systemctl && [ -d /run/systemd/system ]
}

has_openrc() {
    has rc-service && [ -d /run/openrc ]
}

# Whether there is a service to set up; where neither systemd nor OpenRC runs, whether there is a program.
is_installed() {
    if [ "$1" = podman ]; then
        has podman
    elif has_systemd; then
        systemctl cat "$1.service" >/dev/null 2>&1
    elif has_openrc; then
        [ -e "/etc/init.d/$1" ]
    elif [ "$1" = docker ]; then
        has dockerd
    else
        has "$1"
    fi
}

drop_in_of() {
    printf '%s' "/etc/systemd/system/$1.service.d/$own_name"
}

# Prints the hosts that are not to be proxied: those that the files name, such of them as are there, and those that never
# are. Not `*`, for that is all hosts.
no_proxy_list() {
    set -f
    value="=[\"']\{0,1\}\([^\"'#;]*\).*/\1/p"
    named=$(sed -n "h;s/^[^#;]*NO_PROXY$value;g;s/^[^#;]*no_proxy$value" "$@" 2>/dev/null | tr ',' ' ')
    list=
    for host in $named localhost 127.0.0.1 ::1; do
        case "$host" in
            '*' | *[!][A-Za-z0-9.:/_*-]*) continue ;;
        esac
        case ",$list," in
            *",$host,"*) ;;
            *) list=${list:+$list,}$host ;;
        esac
    done
    printf '%s' "$list"
}

# Makes the second argument, a file of this script's, of what is in $work/new, for the service named first.
settle() {
    if is_same "$work/new" "$2"; then
        say "$1 is set up already: $2"
        return
    fi
    change "$1"
    put "$work/new" "$2"
    say "$1 is now set up to use $proxy: $2"
}

# Takes away what `settle` made.
unsettle() {
    [ -e "$2" ] || return 0
    change "$1"
    rm -f "$2"
    rmdir "${2%/*}" 2>/dev/null || true
    say "$1 has its former settings again, without $2"
}

configure_systemd() {
    systemctl cat "$1.service" >"$work/old" 2>/dev/null || true # with the files of others, and ours
    {
        say "$mark"
        say '[Service]'
        say "Environment=\"HTTP_PROXY=$proxy\""
        say "Environment=\"HTTPS_PROXY=$proxy\""
        say "Environment=\"NO_PROXY=$(no_proxy_list "$work/old")\""
    } >"$work/new"
    settle "$1" "$(drop_in_of "$1")"
}

# The other lines of an OpenRC service's settings, all of which are in one file.
other_lines() {
    grep -v "$tail\$" "$1" 2>/dev/null || true
}

configure_openrc() {
    file=/etc/conf.d/$1
    {
        other_lines "$file"
        say "export HTTP_PROXY='$proxy'$tail"
        say "export HTTPS_PROXY='$proxy'$tail"
        say "export NO_PROXY='$(no_proxy_list "$file")'$tail"
    } >"$work/new"
    settle "$1" "$file"
}

remove_openrc() {
    file=/etc/conf.d/$1
    grep -q "$tail\$" "$file" 2>/dev/null || return 0
    change "$1"
    other_lines "$file" >"$work/new"
    if [ -s "$work/new" ]; then
        put "$work/new" "$file"
    else
        rm -f "$file"
    fi
    say "$1 has its former settings again: $file"
}

# podman has no daemon, so there is no environment to set but its own. What it pulls with goes through the proxy; what
# runs in its containers does not, as with the other engines.
configure_podman() {
    {
        say "$mark"
        say '[engine]'
        say "env = ['HTTP_PROXY=$proxy', 'HTTPS_PROXY=$proxy', 'NO_PROXY=$(no_proxy_list /etc/containers/containers.conf "$podman_conf")']"
        say '[containers]'
        say 'http_proxy = false'
    } >"$work/new"
    settle podman "$podman_conf"
}

# Sets up what is installed. Sets $found, whether anything is, and $by_hand, the services that only a person can set up.
configure_engines() {
    found=
    by_hand=
    for service in $services; do
        is_installed "$service" || continue
        found=yes
        if has_systemd; then
            configure_systemd "$service"
        elif has_openrc; then
            configure_openrc "$service"
        else
            by_hand="$by_hand $service"
        fi
    done
    if is_installed podman; then
        found=yes
        configure_podman
    fi
}

# Takes away what is there, be the engine still installed or not.
remove_settings() {
    for service in $services; do
        unsettle "$service" "$(drop_in_of "$service")"
        remove_openrc "$service"
    done
    unsettle podman "$podman_conf"
}

restart_with_systemd() {
    if systemctl is-active --quiet "$1.service"; then
        systemctl restart "$1.service" || fail "$1 did not restart; see: journalctl -u $1.service"
        say "$1 was restarted."
    elif [ "$1" != podman ]; then # which runs when it is called
        say "$1 is not running; it will use the new settings when it is started."
    fi
}

restart_with_openrc() {
    [ "$1" != podman ] || return 0
    if rc-service --quiet "$1" status >/dev/null 2>&1; then
        rc-service "$1" restart >/dev/null || fail "$1 did not restart"
        say "$1 was restarted."
    else
        say "$1 is not running; it will use the new settings when it is started."
    fi
}

restart_engines() {
    if [ -z "$pending" ]; then
        say 'Nothing has changed, so nothing was restarted.'
        return
    fi
    if has_systemd; then systemctl daemon-reload; fi
    for service in $services podman; do
        is_installed "$service" || continue
        case " $pending " in
            *" $service "*) ;;
            *) continue ;;
        esac
        if has_systemd; then
            restart_with_systemd "$service"
        elif has_openrc; then
            restart_with_openrc "$service"
        fi
    done
}

# Looks at what the services run with, for some settings of others go before ours all the same.
check_engines() {
    if is_installed docker && grep -q '"proxies"' /etc/docker/daemon.json 2>/dev/null &&
        ! grep -qF "${proxy%/}" /etc/docker/daemon.json; then
        fail 'docker does not use the proxy yet: take "proxies" out of /etc/docker/daemon.json, and restart it'
    fi
    has_systemd || return 0
    for service in $services; do
        process=$(systemctl show --property=MainPID "$service.service")
        environment=/proc/${process#MainPID=}/environ
        [ -r "$environment" ] || continue # it does not run
        tr '\0' '\n' <"$environment" >"$work/environ"
        grep -qxF "HTTPS_PROXY=$proxy" "$work/environ" ||
            fail "$service does not use the proxy yet: HTTPS_PROXY is set elsewhere too; see: systemctl cat $service" \
                '(and the files that EnvironmentFile= names)'
    done
}

# Says what else runs containers here, and is left alone.
tell_of_others() {
    for file in /etc/systemd/system/k3s.service /etc/systemd/system/k3s-agent.service /etc/rancher/rke2 \
        /var/snap/docker /var/snap/microk8s /home/*/.config/systemd/user/docker.service; do
        if [ -e "$file" ]; then
            say "Not set up, having its own settings for proxy and certificates: what $file belongs to"
        fi
    done
}

set_up() {
    install_certificate
    configure_engines
    restart_engines
    rm -f "$unfinished"
    tell_of_others
    if [ -n "$by_hand" ]; then
        say "There is neither systemd nor OpenRC here. Restart yourself, with this environment:$by_hand"
        say "    HTTP_PROXY=$proxy"
        say "    HTTPS_PROXY=$proxy"
        say "    NO_PROXY=$(no_proxy_list /dev/null)"
        exit 1
    fi
    if [ -z "$found" ]; then
        say 'Neither dockerd, containerd, CRI-O nor podman is installed. Run this again when one is.'
    fi
    check_engines
}

remove() {
    remove_certificate
    remove_settings
    restart_engines
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
    { mkdir -p "$probe" && rmdir "$probe"; } 2>/dev/null || fail '/etc cannot be written to; nothing was changed'

    # The proxy is reached directly, whatever proxy this shell is told to use.
    unset http_proxy HTTP_PROXY all_proxy ALL_PROXY
    work=$(mktemp -d)
    trap 'rm -rf "$work" ${new:+"$new"}' EXIT
    trap 'exit 1' HUP INT TERM
    if [ -e "$unfinished" ]; then change_all; fi
    if [ "$*" = --remove ]; then
        remove
    else
        set_up
    fi
}

# All of it is functions until this line, which a shell runs only when it is there to its closing brace: a download that
# breaks off does nothing.
{ main "$@"; exit; }

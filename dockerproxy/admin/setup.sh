#!/bin/sh
# Configures the container engines on this host to pull through the proxy below, and the host to trust the proxy's CA
# certificate. It supports dockerd, containerd and CRI-O under systemd or OpenRC, and podman, and configures only
# installed ones. Run it as root. It is idempotent: another run changes only settings that differ, and restarts only the
# services concerned. --remove undoes its changes. --ca-sha256 changes nothing if the proxy's CA certificate has another
# fingerprint than the given one, which `dockerproxy status` prints on the server. --check changes nothing at all: it
# says the first thing that keeps this host from pulling through the proxy, and what to do about it.

set -eu
umask 022
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
LC_ALL=C
export LC_ALL

proxy=@PROXY@
registries=@REGISTRIES@
hosted=@HOSTED@
header='# Written by the set-up script of docker-registry-proxy. Another run keeps NO_PROXY and replaces the rest.'
suffix=' # by the set-up script of docker-registry-proxy'
unfinished=/var/lib/docker-registry-proxy-setup.unfinished
probe=/etc/.docker-registry-proxy-setup # test -w /etc will not do: busybox's succeeds for root on a read-only /etc
drop_in_name=zz-docker-registry-proxy.conf # zz: sorts behind other drop-ins, so it overrides them unchanged
podman_conf=/etc/containers/containers.conf.d/$drop_in_name
services='containerd docker crio' # in the order of restarts, because dockerd needs containerd
pending=                          # services to restart
new=                              # temporary file to remove on exit
ca_sha256=                        # the expected fingerprint, in lower case without colons

say() {
    printf '%s\n' "$*"
}

fail() {
    printf '%s\n' "Failed: $*" >&2
    exit 1
}

usage() {
    say "Usage: curl -fsS ${proxy}setup | sudo sh"
    say "       curl -fsS ${proxy}setup | sudo sh -s -- --ca-sha256 FINGERPRINT"
    say "       curl -fsS ${proxy}setup | sudo sh -s -- --remove"
    say "       curl -fsS ${proxy}setup | sudo sh -s -- --check"
}

has() {
    command -v "$1" >/dev/null
}

# Succeeds if the second file exists and has the content of the first.
is_same() {
    [ -f "$2" ] && [ "$(cat "$1")" = "$(cat "$2")" ]
}

# Marks a service for restart. If this script ends before the restart, the file $unfinished makes the next run do it.
mark_changed() {
    : >"$unfinished"
    pending="$pending $1"
}

# Marks all services for restart, because each reads the trust store only when it starts.
mark_all_changed() {
    mark_changed "$services podman"
}

# Replaces the second file atomically by the content of the first, and keeps its owner and mode.
write_file() {
    new=$2.new
    {
        mkdir -p "${2%/*}" &&
            if [ -e "$2" ]; then cp -p "$2" "$new"; fi &&
            cat "$1" >"$new" &&
            mv "$new" "$2"
    } || fail "cannot write $2"
    new=
}

# The CA certificate.

# Sets $update, the command that rebuilds the system's trust store, and $anchor, the path of our certificate in it.
find_trust_store() {
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
        fail 'found no trust store of Debian, Alpine, Fedora or Arch; is ca-certificates installed?'
    fi
}

update_trust_store() {
    # shellcheck disable=SC2086 # a command and its argument
    if ! $update >"$work/output" 2>&1; then # print output only on failure, because some versions always warn
        cat "$work/output" >&2
        fail "cannot update the system's trust store: $update"
    fi
}

# Runs the command after the first argument for at most so many seconds, if there is a program for that. (The option -T of
# busybox's wget crashes some versions of it.)
limited() {
    if timeout 1 cat </dev/null >/dev/null 2>&1; then
        timeout "$@"
    else
        shift
        "$@"
    fi
}

fetch() {
    if has curl; then
        curl -fsSg --max-time 30 -o "$2" "$1"
    elif has wget; then
        limited 30 wget -q -O "$2" "$1"
    else
        fail 'neither curl nor wget is installed'
    fi
}

# Succeeds if the file is exactly one complete PEM certificate, not an error page or a truncated download.
is_certificate() {
    [ "$(sed -n '1p' "$1")" = '-----BEGIN CERTIFICATE-----' ] || return 1
    [ "$(sed -n '$p' "$1")" = '-----END CERTIFICATE-----' ] || return 1
    sed -n '2p' "$1" | grep -q '^MI' || return 1
    if sed '1d;$d' "$1" | grep -qv '^[A-Za-z0-9+/]\{1,64\}=\{0,2\}$'; then return 1; fi
    if has openssl; then openssl x509 -noout -in "$1" 2>/dev/null || return 1; fi
}

# Compares the SHA-256 of the certificate's DER with the expected one.
check_fingerprint() {
    { has sha256sum && has base64; } ||
        fail 'cannot compare the CA certificate: sha256sum or base64 is not installed; nothing was changed'
    sum=$(sed '1d;$d' "$1" | base64 -d | sha256sum) || fail 'cannot compute the SHA-256 of the CA certificate'
    [ "${sum%% *}" = "$ca_sha256" ] ||
        fail "${proxy}ca.crt is another CA certificate: its SHA-256 is ${sum%% *}, not $ca_sha256; nothing was changed"
}

install_certificate() {
    fetch "${proxy}ca.crt" "$work/ca.crt" || fail "cannot fetch ${proxy}ca.crt"
    is_certificate "$work/ca.crt" || fail "${proxy}ca.crt is not a certificate; nothing was changed"
    if [ -n "$ca_sha256" ]; then check_fingerprint "$work/ca.crt"; fi
    if [ -z "$pending" ] && is_same "$work/ca.crt" "$anchor"; then
        say "The CA certificate is already trusted: $anchor"
        return
    fi
    mark_all_changed
    write_file "$work/ca.crt" "$anchor"
    update_trust_store
    say "The CA certificate is now trusted: $anchor"
}

remove_certificate() {
    [ -e "$anchor" ] || return 0
    mark_all_changed
    rm -f "$anchor"
    update_trust_store
    say "The CA certificate was removed: $anchor"
}

# The container engines.

has_systemd() {
    has systemctl && [ -d /run/systemd/system ]
}

has_openrc() {
    has rc-service && [ -d /run/openrc ]
}

# Succeeds if the service exists. Without systemd and OpenRC: if the program exists.
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

drop_in_path() {
    printf '%s' "/etc/systemd/system/$1.service.d/$drop_in_name"
}

# Prints the value of NO_PROXY: the hosts in the NO_PROXY of existing files among the arguments, then the defaults.
# Leaves out `*`, because it would bypass the proxy for all hosts.
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

# Writes $work/new to the second argument, a settings file for the service in the first one.
write_settings() {
    if is_same "$work/new" "$2"; then
        say "$1 is already set up: $2"
        return
    fi
    mark_changed "$1"
    write_file "$work/new" "$2"
    say "$1 is now set up to use $proxy: $2"
}

# Removes the file that `write_settings` created.
remove_settings() {
    [ -e "$2" ] || return 0
    mark_changed "$1"
    rm -f "$2"
    rmdir "${2%/*}" 2>/dev/null || true
    say "The proxy settings of $1 were removed: $2"
}

configure_systemd() {
    systemctl cat "$1.service" >"$work/old" 2>/dev/null || true # the unit with all its drop-ins, ours included
    {
        say "$header"
        say '[Service]'
        say "Environment=\"HTTP_PROXY=$proxy\""
        say "Environment=\"HTTPS_PROXY=$proxy\""
        say "Environment=\"NO_PROXY=$(no_proxy_list "$work/old")\""
    } >"$work/new"
    write_settings "$1" "$(drop_in_path "$1")"
}

# Prints the lines of an OpenRC settings file that this script did not write.
other_lines() {
    grep -v "$suffix\$" "$1" 2>/dev/null || true
}

configure_openrc() {
    file=/etc/conf.d/$1
    {
        other_lines "$file"
        say "export HTTP_PROXY='$proxy'$suffix"
        say "export HTTPS_PROXY='$proxy'$suffix"
        say "export NO_PROXY='$(no_proxy_list "$file")'$suffix"
    } >"$work/new"
    write_settings "$1" "$file"
}

remove_openrc() {
    file=/etc/conf.d/$1
    grep -q "$suffix\$" "$file" 2>/dev/null || return 0
    mark_changed "$1"
    other_lines "$file" >"$work/new"
    if [ -s "$work/new" ]; then
        write_file "$work/new" "$file"
    else
        rm -f "$file"
    fi
    say "The proxy settings of $1 were removed: $file"
}

# podman has no daemon, so this sets the environment of podman itself. Its pulls go through the proxy. As with the other
# engines, its containers do not.
configure_podman() {
    {
        say "$header"
        say '[engine]'
        say "env = ['HTTP_PROXY=$proxy', 'HTTPS_PROXY=$proxy', 'NO_PROXY=$(no_proxy_list /etc/containers/containers.conf "$podman_conf")']"
        say '[containers]'
        say 'http_proxy = false'
    } >"$work/new"
    write_settings podman "$podman_conf"
}

# Configures the installed engines. Sets $found if there is one, and $manual, the services that need manual set-up.
configure_engines() {
    found=
    manual=
    for service in $services; do
        is_installed "$service" || continue
        found=yes
        if has_systemd; then
            configure_systemd "$service"
        elif has_openrc; then
            configure_openrc "$service"
        else
            manual="$manual $service"
        fi
    done
    if is_installed podman; then
        found=yes
        configure_podman
    fi
}

# Removes all settings, even those of engines that are no longer installed.
remove_all_settings() {
    for service in $services; do
        remove_settings "$service" "$(drop_in_path "$service")"
        remove_openrc "$service"
    done
    remove_settings podman "$podman_conf"
}

restart_with_systemd() {
    if systemctl is-active --quiet "$1.service"; then
        systemctl restart "$1.service" || fail "$1 did not restart; see: journalctl -u $1.service"
        say "$1 was restarted."
    elif [ "$1" != podman ]; then # podman itself reads its settings at each call
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

# Checks the environment of the running services, because some settings override ours.
check_engines() {
    if is_installed docker && grep -q '"proxies"' /etc/docker/daemon.json 2>/dev/null &&
        ! grep -qF "${proxy%/}" /etc/docker/daemon.json; then
        fail 'docker does not use the proxy yet: remove "proxies" from /etc/docker/daemon.json, then restart docker'
    fi
    has_systemd || return 0
    for service in $services; do
        process=$(systemctl show --property=MainPID "$service.service")
        environment=/proc/${process#MainPID=}/environ
        [ -r "$environment" ] || continue # not running
        tr '\0' '\n' <"$environment" >"$work/environ"
        grep -qxF "HTTPS_PROXY=$proxy" "$work/environ" ||
            fail "$service does not use the proxy yet: HTTPS_PROXY is also set elsewhere; see: systemctl cat $service" \
                '(and the files named by EnvironmentFile=)'
    done
}

# Reports other container engines on this host, which this script does not configure.
report_unsupported_engines() {
    for file in /etc/systemd/system/k3s.service /etc/systemd/system/k3s-agent.service /etc/rancher/rke2 \
        /var/snap/docker /var/snap/microk8s /home/*/.config/systemd/user/docker.service; do
        if [ -e "$file" ]; then
            say "Not set up, because it has its own proxy and certificate settings: the engine of $file"
        fi
    done
}

set_up() {
    install_certificate
    configure_engines
    restart_engines
    rm -f "$unfinished"
    report_unsupported_engines
    if [ -n "$manual" ]; then
        say "Neither systemd nor OpenRC is running. Restart these services with the environment below:$manual"
        say "    HTTP_PROXY=$proxy"
        say "    HTTPS_PROXY=$proxy"
        say "    NO_PROXY=$(no_proxy_list /dev/null)"
        exit 1
    fi
    if [ -z "$found" ]; then
        say 'Neither dockerd, containerd, CRI-O nor podman is installed. Run this script again after installing one.'
    fi
    check_engines
}

remove() {
    remove_certificate
    remove_all_settings
    restart_engines
    rm -f "$unfinished"
}

# The check, which changes nothing.

set_up_hint="run the set-up script: curl -fsS ${proxy}setup | sudo sh"

# Sets $bundle to the file with all certificates that programs on this host trust.
find_bundle() {
    for bundle in /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem /etc/pki/tls/certs/ca-bundle.crt \
        /etc/ssl/certs/ca-certificates.crt /etc/ssl/cert.pem; do
        [ ! -r "$bundle" ] || return 0
    done
    bundle=
}

# Succeeds if the PEM file in the second argument contains the certificate in the first one, in lines of any length.
contains_certificate() {
    body=$(sed '1d;$d' "$1" | tr -d '\n\r')
    tr -d '\n\r' <"$2" | grep -qF "$body"
}

check_trust() {
    fetch "${proxy}ca.crt" "$work/ca.crt" 2>"$work/output" ||
        fail "$proxy does not answer: $(head -n 1 "$work/output"); is it running, and may this host connect to it?"
    is_certificate "$work/ca.crt" ||
        fail "${proxy}ca.crt is not a certificate: something else answers at that address; use the proxy's own"
    say "The proxy answers: $proxy"
    find_trust_store
    find_bundle
    if [ -n "$bundle" ] && contains_certificate "$work/ca.crt" "$bundle"; then
        say "Its CA is trusted: $bundle"
    elif is_same "$work/ca.crt" "$anchor"; then
        fail "the trust store does not have the proxy's CA, although $anchor is there; run: $update"
    elif [ -e "$anchor" ]; then
        fail "this host trusts another CA than the proxy's, which is new: $anchor; $set_up_hint"
    else
        fail "this host does not trust the proxy's CA: $anchor is missing; $set_up_hint"
    fi
}

# Succeeds if the URL is that of the same proxy, maybe by another of its names.
is_this_proxy() {
    [ "${1%/}" = "${proxy%/}" ] && return
    case "$1" in
        http://*) fetch "${1%/}/ca.crt" "$work/other.crt" 2>/dev/null && is_same "$work/ca.crt" "$work/other.crt" ;;
        *) return 1 ;;
    esac
}

# Prints the one of the hosts in the first argument that a value of NO_PROXY excludes from the proxy, if it excludes one.
# As in Go: `*` is every host, a name stands for itself and all names below it, and a name with a dot before it for those
# below it.
excluded_host() {
    set -f
    for entry in $(printf '%s' "$2" | tr ',' ' '); do
        case "$entry" in
            *:443) name=${entry%:443} ;;
            *:*) continue ;; # an address of IPv6, or another port
            *) name=$entry ;;
        esac
        for host in $1; do
            case "$name" in
                '*') printf '%s' "$host" && return ;;
                '*.'* | .*) below=${name#\*} && itself=- ;;
                *) below=.$name && itself=$name ;;
            esac
            case "$host" in
                "$itself" | *"$below") printf '%s' "$host" && return ;;
            esac
        done
    done
}

# Checks the settings of the engine in the first argument: its HTTPS_PROXY, and its NO_PROXY. The last argument says how
# to apply changed settings.
check_settings() {
    if [ -z "$2" ]; then fail "$1 does not use the proxy: it has no HTTPS_PROXY; $4"; fi
    is_this_proxy "$2" || fail "$1 uses another proxy, $2; $4"
    excluded=$(excluded_host "$registries" "$3")
    if [ -n "$excluded" ]; then
        fail "NO_PROXY of $1 is too wide: $excluded is reached without the proxy ($3); remove that entry, then $4"
    fi
    if [ -n "$(excluded_host "$hosted" "$3")" ]; then
        resolves "$hosted" || fail "$1 reaches $hosted without the proxy ($3), and that name does not resolve on this" \
            "host; remove that entry of NO_PROXY, then $4"
    fi
    say "$1 uses the proxy."
}

# Prints the process ID of the running service in the first argument.
find_process() {
    if has_systemd; then
        process=$(systemctl show --property=MainPID "$1.service")
        process=${process#MainPID=}
        [ "$process" = 0 ] || printf '%s' "$process"
        return
    fi
    program=$1
    if [ "$1" = docker ]; then
        program=dockerd
        process=$(cat /run/docker.pid 2>/dev/null || true)
        if [ -n "$process" ] && [ -d "/proc/$process" ]; then
            printf '%s' "$process"
            return
        fi
    fi
    for directory in /proc/[0-9]*; do
        if [ "$(cat "$directory/comm" 2>/dev/null)" = "$program" ]; then
            printf '%s' "${directory#/proc/}"
            return
        fi
    done
}

# Prints the value of a variable in $work/environ, which has one on each line.
variable() {
    sed -n "s/^$1=//p" "$work/environ" | head -n 1
}

check_service() {
    process=$(find_process "$1")
    if [ -z "$process" ] || [ ! -r "/proc/$process/environ" ]; then
        say "$1 is not running, so it was not checked."
        return
    fi
    if [ "$1" = docker ] && grep -q '"proxies"' /etc/docker/daemon.json 2>/dev/null; then
        grep -qF "${proxy%/}" /etc/docker/daemon.json ||
            fail 'docker uses another proxy: remove "proxies" from /etc/docker/daemon.json, then restart docker'
        say "docker uses the proxy: /etc/docker/daemon.json"
        return
    fi
    tr '\0' '\n' <"/proc/$process/environ" >"$work/environ"
    https_proxy_of=$(variable HTTPS_PROXY)
    [ -n "$https_proxy_of" ] || https_proxy_of=$(variable https_proxy)
    no_proxy_of=$(variable NO_PROXY)
    [ -n "$no_proxy_of" ] || no_proxy_of=$(variable no_proxy)
    advice=$set_up_hint
    if grep -qF "$proxy" "$(drop_in_path "$1")" "/etc/conf.d/$1" 2>/dev/null; then
        advice="restart $1, which has not been restarted since it was set up"
    fi
    check_settings "$1" "$https_proxy_of" "$no_proxy_of" "$advice"
}

check_podman() {
    : >"$work/environ"
    if [ -r "$podman_conf" ]; then tr '"' "'" <"$podman_conf" | tr "'" '\n' >"$work/environ"; fi
    check_settings podman "$(variable HTTPS_PROXY)" "$(variable NO_PROXY)" "$set_up_hint"
}

check_engine_settings() {
    found=
    for service in $services; do
        if is_installed "$service"; then
            found=yes
            check_service "$service"
        fi
    done
    if is_installed podman; then
        found=yes
        check_podman
    fi
    [ -n "$found" ] || say 'Neither dockerd, containerd, CRI-O nor podman is installed.'
}

# Succeeds if the host has an address on this host, or if no program here can say it. Alpine may lack getent.
resolves() {
    if has getent; then
        getent hosts "$1" >/dev/null
    elif has ping; then
        ping -c 1 -W 1 "$1" 2>/dev/null | grep -q '^PING '
    fi
}

# The engines reach the hosted registry through the proxy, which knows its name. Other programs have to resolve it.
check_name() {
    if ! has getent && ! has ping; then
        say "Whether $hosted resolves was not checked, because neither getent nor ping is installed."
    elif resolves "$hosted"; then
        say "$hosted resolves."
    else
        say "Note: $hosted does not resolve on this host. Engines reach it through the proxy. Other programs need an entry"
        say "in /etc/hosts, or avahi-daemon and libnss-mdns."
    fi
}

manifest_types=application/vnd.oci.image.index.v1+json,application/vnd.docker.distribution.manifest.list.v2+json
manifest_types=$manifest_types,application/vnd.docker.distribution.manifest.v2+json
manifest_types=$manifest_types,application/vnd.oci.image.manifest.v1+json

# Fetches the URL in the second argument through the proxy with the token in the first one, if that is not empty, as the
# engines do. Writes the head to $work/head.
fetch_through_proxy() {
    token=$1
    url=$2
    shift 2
    curl -sSg --max-time 60 --proxy "$proxy" --cacert "$bundle" -D "$work/head" -o "$work/body" \
        ${token:+-H "Authorization: Bearer $token"} \
        -H "Accept: $manifest_types" "$@" "$url" 2>"$work/output" ||
        fail "$image cannot be pulled through the proxy: $(head -n 1 "$work/output"); run on the server: dockerproxy doctor"
}

# Prints a parameter of the registry's challenge.
challenge() {
    tr -d '\r' <"$work/head" | sed -n "s/^[Ww][Ww][Ww]-[Aa]uthenticate: [Bb]earer .*$1=\"\([^\"]*\)\".*/\1/p"
}

check_pull() {
    image=docker.io/library/hello-world
    if has curl; then
        url=https://registry-1.docker.io/v2/library/hello-world/manifests/latest
        fetch_through_proxy '' "$url" -I
        realm=$(challenge realm)
        if [ -n "$realm" ]; then
            fetch_through_proxy '' "$realm?service=$(challenge service)&scope=repository:library/hello-world:pull"
            token=$(sed -n 's/.*"token" *: *"\([^"]*\)".*/\1/p' "$work/body")
            fetch_through_proxy "$token" "$url" -I
        fi
    else
        # busybox's wget has neither HEAD nor TLS through a proxy.
        limited 60 wget -S --header "Accept: $manifest_types" -O "$work/body" "${proxy}v2/$image/manifests/latest" 2>"$work/head" || true
    fi
    tr -d '\r' <"$work/head" | sed 's/^ *//' >"$work/fields"
    status=$(sed -n 's/^HTTP\/[0-9.]* *//p' "$work/fields" | tail -n 1)
    cache=$(sed -n 's/^[Xx]-[Cc]ache: *//p' "$work/fields" | tail -n 1)
    case "$status" in
        200*) ;;
        *) fail "$image cannot be pulled through the proxy (status ${status:-unknown}); run on the server: dockerproxy doctor" ;;
    esac
    [ -n "$cache" ] || fail "$image did not come from the proxy, because the answer has no X-Cache; what is between?"
    say "$image can be pulled through the proxy (X-Cache: $cache)."
}

check() {
    check_trust
    check_engine_settings
    check_name
    check_pull
    say 'All is well.'
}

# Sets $ca_sha256 from a fingerprint of 64 hexadecimal digits, in any case, with or without colons.
parse_fingerprint() {
    ca_sha256=$(printf '%s' "$1" | tr -d ':' | tr A-F a-f)
    case "$ca_sha256" in
        '' | *[!0-9a-f]*) ;;
        *) [ ${#ca_sha256} != 64 ] || return 0 ;;
    esac
    say "--ca-sha256 expects the 64 hexadecimal digits that \`dockerproxy status\` prints on the server, not '$1'." >&2
    exit 2
}

# Makes a temporary directory, $work.
prepare() {
    # Connect to the proxy directly, even if this shell has a proxy configured.
    unset http_proxy HTTP_PROXY https_proxy HTTPS_PROXY all_proxy ALL_PROXY no_proxy NO_PROXY
    work=$(mktemp -d)
    trap 'rm -rf "$work" ${new:+"$new"}' EXIT
    trap 'exit 1' HUP INT TERM
}

main() {
    arguments=$*
    case "$arguments" in
        '' | --remove | --check) ;;
        --ca-sha256[=\ ]*) parse_fingerprint "${arguments#--ca-sha256?}" ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
    if [ "$arguments" = --check ]; then
        [ "$(id -u)" = 0 ] || fail 'the check reads the environment of the engines; run it as root (with sudo)'
        prepare
        check
        return
    fi
    [ "$(id -u)" = 0 ] || fail 'this script changes the system configuration; run it as root (with sudo)'
    find_trust_store
    { mkdir -p "$probe" && rmdir "$probe"; } 2>/dev/null || fail '/etc is not writable; nothing was changed'

    prepare
    if [ -e "$unfinished" ]; then mark_all_changed; fi
    if [ "$arguments" = --remove ]; then
        remove
    else
        set_up
    fi
}

# A truncated download does nothing: everything above is a function, and the shell runs this line only if it is complete
# to its closing brace.
{ main "$@"; exit; }

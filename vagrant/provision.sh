#!/bin/sh
# Sets up the proxy on a Debian 13 machine: vagrant/provision.sh [PACKAGE], which is a file in dist/. Vagrant runs it as
# root at the first `vagrant up` and at each `vagrant provision`. Without PACKAGE, it builds one from the sources.
#
# /vagrant is the shared checkout of the host. The kinds of shares differ: the owner may be a user that this machine
# does not have, and chown and chmod may have no effect.

set -eu
export DEBIAN_FRONTEND=noninteractive

share=/vagrant
package=${1:-}
name=docker-registry-proxy
settings=/etc/$name/environment
units=/etc/systemd/system
policy=/usr/sbin/policy-rc.d

say() {
    printf '%s\n' "$*"
}

fail() {
    printf '%s\n' "Failed: $*" >&2
    exit 1
}

check_share() {
    mountpoint -q "$share" ||
        fail "$share is a copy of the checkout, so pushed images would be lost with the machine; use a shared folder"
}

# The package.

# Prints the file to install. Without PACKAGE, it is built again if the sources have changed.
find_package() {
    if [ -n "$package" ]; then
        say "$share/dist/$package"
        return
    fi
    build=/var/cache/$name-build
    sources='debian dockerproxy docs man systemd tests tools twisted .env.example CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in'
    sources="$sources Makefile README.md SECURITY.md pyproject.toml ruff.toml setup.cfg setup.py"
    cd "$share"
    # shellcheck disable=SC2086 # the variable contains several names
    if [ ! -e "$build/built" ] || [ -n "$(find $sources -type f -newer "$build/built" ! -name '*.pyc')" ]; then
        say 'Building the package, which takes a few minutes.' >&2
        rm -rf "$build"
        mkdir -p "$build/source"
        : >"$build/begun"
        # shellcheck disable=SC2086 # the variable contains several names
        tar --exclude=__pycache__ --exclude=dropin.cache -cf - $sources |
            tar -C "$build/source" --no-same-owner -xf -
        cd "$build/source"
        apt-get update -qq >&2
        apt-get install -y -qq --no-install-recommends dpkg-dev >&2
        apt-get build-dep -y -qq --no-install-recommends -Pnocheck . >&2
        DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage --build=binary -Pnocheck --no-sign >"$build/log" 2>&1 ||
            { tail -n 40 "$build/log" >&2; fail 'the package could not be built'; }
        mv "$build/begun" "$build/built"
    fi
    find "$build" -maxdepth 1 -name '*.deb'
}

install_package() {
    file=$(find_package)
    [ -f "$file" ] || fail "$file does not exist in this machine"
    sum=$(sha256sum <"$file")
    if [ "$(cat /var/lib/$name-installed 2>/dev/null)" = "$sum" ] && dpkg -s "$name" >/dev/null 2>&1; then
        say 'The package is already installed.'
        return
    fi
    # Do not let apt start the service. It is started below, after its settings are written; before that it would create
    # a CA in the wrong place.
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    # apt reads the file as the user _apt, which may not be able to read the share.
    mkdir -p /var/cache/$name
    cp "$file" "/var/cache/$name/$name.deb"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 avahi-daemon libnss-mdns
    apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 --reinstall --allow-downgrades \
        -o Dpkg::Options::=--force-confold "/var/cache/$name/$name.deb"
    rm -r /var/cache/$name
    say "$sum" >/var/lib/$name-installed
}

# The settings.

names() {
    grep -q "^[[:space:]]*$1[[:space:]]*=" "$share/.env" 2>/dev/null
}

write_settings() {
    umask 027
    {
        say '# Generated from .env by vagrant/provision.sh. Change .env, and run: vagrant provision'
        # Editors on Windows end lines with CR LF.
        if [ -e "$share/.env" ]; then sed 's/\r$//' "$share/.env"; fi
        say
        names REGISTRY_DIR || say "REGISTRY_DIR=$share/registry"
        names CA_DIR || say "CA_DIR=$share/ca"
        # The key of a CA that rpardini/docker-registry-proxy created has the passphrase in its source code.
        if grep -q ENCRYPTED "$share/ca/ca.key" 2>/dev/null && ! names CA_KEY_PASSPHRASE; then
            say 'CA_KEY_PASSPHRASE=foobar'
        fi
    } >"$settings.new"
    chgrp "$name" "$settings.new"
    mv "$settings.new" "$settings"
    umask 022
}

# The shared folder.

as_user() {
    number=$1
    shift
    setpriv --reuid="$number" --regid="$(id -g "$name")" --clear-groups --inh-caps=-all "$@"
}

# Creates a folder in the share as the share's owner. As root this may be forbidden, or create a folder that belongs to
# root on the host.
make_folder() {
    [ -d "$1" ] || as_user "$owner" mkdir "$1" 2>/dev/null || mkdir "$1" 2>/dev/null || fail "cannot create $1"
}

# Checks that a user can do everything in a folder that the daemon does there.
can_write() {
    # shellcheck disable=SC2016 # for the shell that is started
    as_user "$1" sh -ec 'cd "$0"; : >.probe; mv .probe .probe2; flock .probe2 true; rm .probe2' "$2" 2>/dev/null
}

# Sets $user, the uid of the daemon. It must be the owner of the folders, because many shares support no other user. If
# that is root, the folders are given to the share's owner instead, or to the package's user if that is root as well.
choose_user() {
    owner=$(stat -c %u "$share")
    make_folder "$share/registry"
    make_folder "$share/ca"
    user=$(stat -c %u "$share/registry")
    [ "$user" != 0 ] || user=$owner
    [ "$user" != 0 ] || user=$(id -u "$name")
    # systemd needs a user with a name.
    if ! getent passwd "$user" >/dev/null; then
        userdel "$name-share" 2>/dev/null || true
        useradd --system --key SYS_UID_MAX="$user" --uid "$user" --gid "$name" --home-dir /nonexistent \
            --shell /usr/sbin/nologin "$name-share"
    fi
    for folder in "$share/registry" "$share/ca"; do
        find "$folder" ! -user "$user" -exec chown -h "$user" {} + 2>/dev/null || true
        can_write "$user" "$folder" || fail "only root can write to $folder; change its owner on the host"
    done
}

write_units() {
    mkdir -p "$units/$name.service.d"
    {
        say '[Unit]'
        say '# Without the share, the daemon would create a new CA in the mount point.'
        say 'After=local-fs.target remote-fs.target'
        say "ConditionPathIsMountPoint=$share"
        say '[Service]'
        say "User=$user"
        say "ReadWritePaths=$share/registry $share/ca"
    } >"$units/$name.service.d/share.conf"
    for socket in "$name" "$name-registry" "$name-http"; do
        mkdir -p "$units/$socket.socket.d"
        printf '[Unit]\nConditionPathIsMountPoint=%s\n' "$share" >"$units/$socket.socket.d/share.conf"
    done
    systemctl daemon-reload
}

start() {
    # avahi-daemon has read the host name before Vagrant set it.
    systemctl restart avahi-daemon.service
    systemctl restart "$name.service" || {
        systemctl status --no-pager --full --lines=5 "$name.service" >&2 || true
        fail 'the service did not start; see the line "Status:" above'
    }
    systemctl is-active --quiet "$name.service" || fail "the service is not running; see: journalctl -u $name"
    say "Running, as $(hostname).local: $(hostname -I)"
}

check_share
install_package
choose_user
write_settings
write_units
start

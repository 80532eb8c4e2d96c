#!/bin/sh
# Makes a Debian 13 machine run the proxy: vagrant/provision.sh [PACKAGE], a file in dist/. Vagrant runs it as root, at
# the first `vagrant up` and at each `vagrant provision`. Without PACKAGE, one is built from the sources.
#
# /vagrant is the checkout on the host, shared by means that differ in what they can: it may belong to somebody whom
# this machine does not know, and its files may be nobody else's whatever chown and chmod are told.

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
        fail "$share is a copy of the checkout, so what is pushed would be lost with the machine; share it another way"
}

# The package.

# Prints the file to install. It is built anew when the sources have changed.
find_package() {
    if [ -n "$package" ]; then
        say "$share/dist/$package"
        return
    fi
    build=/var/cache/$name-build
    sources='debian dockerproxy docs man systemd tests tools twisted .env.example CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in'
    sources="$sources Makefile README.md SECURITY.md pyproject.toml ruff.toml setup.cfg setup.py"
    cd "$share"
    # shellcheck disable=SC2086 # several names
    if [ ! -e "$build/built" ] || [ -n "$(find $sources -type f -newer "$build/built" ! -name '*.pyc')" ]; then
        say 'Building the package: this takes a few minutes.' >&2
        rm -rf "$build"
        mkdir -p "$build/source"
        : >"$build/begun"
        # shellcheck disable=SC2086 # several names
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
    [ -f "$file" ] || fail "there is no $file in this machine"
    sum=$(sha256sum <"$file")
    if [ "$(cat /var/lib/$name-installed 2>/dev/null)" = "$sum" ] && dpkg -s "$name" >/dev/null 2>&1; then
        say 'The package is installed already.'
        return
    fi
    # The service is started below, when its settings are there: else it would make an authority that nobody wants.
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    # Where _apt, which apt reads it as, can read it too.
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
        say '# Made of .env by vagrant/provision.sh. Change .env, and run: vagrant provision'
        # An editor on Windows may have ended the lines its way.
        if [ -e "$share/.env" ]; then sed 's/\r$//' "$share/.env"; fi
        say
        names REGISTRY_DIR || say "REGISTRY_DIR=$share/registry"
        names CA_DIR || say "CA_DIR=$share/ca"
        # An authority that rpardini/docker-registry-proxy made has the pass phrase that is in its source.
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

# Makes a folder in the share, by the share's owner: root may be nobody there, or make what is root's on the host.
make_folder() {
    [ -d "$1" ] || as_user "$owner" mkdir "$1" 2>/dev/null || mkdir "$1" 2>/dev/null || fail "$1 cannot be made"
}

# Whether a user can do in a folder what the daemon does there.
can_write() {
    # shellcheck disable=SC2016 # for the shell that is started
    as_user "$1" sh -ec 'cd "$0"; : >.probe; mv .probe .probe2; flock .probe2 true; rm .probe2' "$2" 2>/dev/null
}

# Sets $user, the number of the user that the daemon runs as: it has to be the one to whom the folders belong, for many
# shares know no other. If that is root they are given away instead, to the share's owner.
choose_user() {
    owner=$(stat -c %u "$share")
    make_folder "$share/registry"
    make_folder "$share/ca"
    user=$(stat -c %u "$share/registry")
    [ "$user" != 0 ] || user=$owner
    [ "$user" != 0 ] || user=$(id -u "$name")
    # systemd starts nothing as a user who has no name.
    if ! getent passwd "$user" >/dev/null; then
        userdel "$name-share" 2>/dev/null || true
        useradd --system --key SYS_UID_MAX="$user" --uid "$user" --gid "$name" --home-dir /nonexistent \
            --shell /usr/sbin/nologin "$name-share"
    fi
    for folder in "$share/registry" "$share/ca"; do
        find "$folder" ! -user "$user" -exec chown -h "$user" {} + 2>/dev/null || true
        can_write "$user" "$folder" || fail "nobody but root can write to $folder: change its owner on the host"
    done
}

write_units() {
    mkdir -p "$units/$name.service.d"
    {
        say '[Unit]'
        say '# Before the share is there, an authority would be made in its place.'
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
    # It took its name when the machine had none yet.
    systemctl restart avahi-daemon.service
    systemctl restart "$name.service" || {
        systemctl status --no-pager --full --lines=5 "$name.service" >&2 || true
        fail 'the service did not start; the line above that begins with "Status:" tells why'
    }
    systemctl is-active --quiet "$name.service" || fail "the service does not run; see: journalctl -u $name"
    say "Running, as $(hostname).local: $(hostname -I)"
}

check_share
install_package
choose_user
write_settings
write_units
start

# shellcheck shell=bash
# Functions for machines that boot Debian 13 with systemd. They are containers on an isolated switch. Source this file.
#
#   check_host                         fail with one sentence if root lacks a right that the machines need
#   make_tree                          create the tree that the machines boot, if it does not exist
#   network_up                         create the switch
#   start_machine NAME ADDRESS/24 [OPTION...]   boot a machine from an overlay of the tree, and wait until it is up;
#                                      the options are systemd-nspawn's
#   on NAME COMMAND...                 run a command on a machine
#   root_of NAME                       print the path of a machine's root directory
#   kill_machine NAME                  end a machine as if its power failed; `start_machine` boots it again, with its files
#   stop_machines                      stop all machines, and remove the switch
#
# Needs root. PID 1 need not be systemd. cgroups of version 1 and 2 are supported.

MACHINES=${MACHINES:?set it to a folder for the machines}
TREE=${TREE:?set it to the tree that they boot}
SWITCH=drp-switch

# Packages installed in the tree, and packages only downloaded into it: the dependencies of the package and of its
# tests, which apt installs later.
INSTALLED=systemd,systemd-sysv,dbus,libpam-systemd,libnss-systemd,iproute2,procps,avahi-daemon,libnss-mdns,ca-certificates,curl,sudo,docker.io,docker-cli,iptables,python3
LATER=python3-twisted,python3-openssl,python3-cryptography,python3-service-identity,python3-attr,python3-bcrypt,python3-prometheus-client
LATER+=,python3-jinja2,python3-rich,python3-argcomplete,python3-botocore,python3-yaml
LATER+=,autopkgtest,dpkg-dev,python3-hypothesis,python3-pytest

check_host() {
    "$(dirname "${BASH_SOURCE[0]}")/../../tools/apt-install" systemd-nspawn=systemd-container ip=iproute2 pgrep=procps \
        nsenter=util-linux findmnt=util-linux
    allowed "make namespaces and mount file systems (CAP_SYS_ADMIN)" unshare --mount mount -t tmpfs tmpfs "$MACHINES"
    allowed "make network namespaces (CAP_NET_ADMIN)" unshare --net ip link add name br0 type bridge
    allowed "make user namespaces, which the service needs (user.max_user_namespaces is 0, or this is a chroot)" \
        unshare --user true
    allowed "make control groups: /sys/fs/cgroup has none, or is read-only" make_cgroup
    # If the machines' folder is itself on an overlay, as in a container, it cannot be the upper layer of another one.
    if ! mount_overlay 2>/dev/null; then
        mount -t tmpfs -o mode=755 machines "$MACHINES"
        allowed "mount overlays" mount_overlay
    fi
}

allowed() { # DESCRIPTION COMMAND...: fail with a sentence if the command fails
    local description=$1 output
    shift
    if ! output=$("$@" 2>&1); then
        echo "Machines cannot be started here because root is not allowed to $description." >&2
        echo "$output" >&2
        return 1
    fi
}

make_cgroup() { # create a control group and remove it again
    local hierarchy=
    read -r hierarchy < <(cgroups)
    mkdir "$hierarchy/drp-check" && rmdir "$hierarchy/drp-check"
}

mount_overlay() { # try an overlay mount in a private namespace
    local check=$MACHINES/check status=0
    mkdir -p "$check"/{upper,work}
    unshare --mount mount -t overlay check -o "lowerdir=/usr,upperdir=$check/upper,workdir=$check/work" "$check" || status=$?
    rm -rf "$check"
    return "$status"
}

make_tree() { "$(dirname "${BASH_SOURCE[0]}")/../../tools/debian-root" "${TREE%/root}" "$INSTALLED" "$LATER"; }

root_of() { echo "$MACHINES/$1/root"; }

on() {
    local name=$1
    shift
    nsenter --target "$(cat "$MACHINES/$name/leader")" --all --root --wd -- \
        env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb DEBIAN_FRONTEND=noninteractive \
        SYSTEMD_PAGER= "$@"
}

network_up() {
    ip netns add "$SWITCH"
    # Without snooping, multicast (mDNS) reaches all ports. With it, a querier would be needed, and there is none.
    ip -n "$SWITCH" link add br0 type bridge mcast_snooping 0
    ip -n "$SWITCH" link set br0 up
}

start_machine() {
    local name=$1 address=$2 folder=$MACHINES/$1 namespace=drp-$1 port
    port=port-${address##*.}
    port=${port%/*}
    shift 2
    mkdir -p "$folder"/{upper,work,root}
    mount -t overlay "drp-$name" -o "lowerdir=$TREE,upperdir=$folder/upper,workdir=$folder/work" "$folder/root"
    echo "$name" >"$folder/root/etc/hostname"
    rm -f "$folder"/root/etc/systemd/system/*.wants/docker.* # a test that needs dockerd starts it

    ip netns add "$namespace"
    ip -n "$SWITCH" link add "$port" type veth peer name host0 netns "$namespace"
    ip -n "$SWITCH" link set "$port" master br0 up
    ip -n "$namespace" link set lo up
    ip -n "$namespace" addr add "$address" dev host0
    ip -n "$namespace" link set host0 up

    # With --keep-unit a machine stays in the cgroup of the process that starts it, so each is started in its own one.
    (
        join_cgroups "$name"
        exec setsid systemd-nspawn --quiet --directory="$folder/root" --machine="$name" --boot --register=no --keep-unit \
            --console=pipe --resolv-conf=off --timezone=off --link-journal=no \
            --network-namespace-path="/run/netns/$namespace" "$@" >"$folder/console" 2>&1 </dev/null
    ) &
    echo $! >"$folder/nspawn"
    if ! wait_for 60 is_up_or_ended "$name" || ended "$(cat "$folder/nspawn")"; then
        echo "$name did not boot:" >&2
        tail -n 30 "$folder/console" >&2
        return 1
    fi
    open_cgroups "$name"
}

# The machine's PID 1 is nspawn's only child after a preparatory process has ended.
is_up() {
    pgrep --oldest --parent "$(cat "$MACHINES/$1/nspawn")" >"$MACHINES/$1/leader" || return
    [[ $(on "$1" systemctl is-system-running 2>/dev/null) =~ ^(running|degraded)$ ]]
}

is_up_or_ended() { is_up "$1" || ended "$(cat "$MACHINES/$1/nspawn")"; }

# wait_for SECONDS COMMAND...: wait until the command succeeds; fail after that time
wait_for() {
    local ends=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$ends" ] || return 1
        sleep 0.1
    done
}

cgroups() { findmnt --raw --noheadings --output TARGET --types cgroup,cgroup2 | grep '^/sys/fs/cgroup'; }

join_cgroups() {
    local hierarchy file
    for hierarchy in $(cgroups); do
        mkdir -p "$hierarchy/drp-$1"
        for file in cpuset.cpus cpuset.mems; do # a new group of version 1 has them empty, and then accepts no process
            if [ -e "$hierarchy/$file" ]; then
                cat "$hierarchy/$file" >"$hierarchy/drp-$1/$file"
            fi
        done
        echo "$BASHPID" >"$hierarchy/drp-$1/cgroup.procs"
    done
}

# nspawn mounts controllers of version 1 read-only, but dockerd in the machine has to write to them.
open_cgroups() {
    # shellcheck disable=SC2016 # for the shell on the machine
    on "$1" sh -c 'mounts=$(awk "\$3 == \"cgroup\" && \$2 !~ /systemd/ {print \$2}" /proc/mounts)
        for mount in $mounts; do mount -o remount,bind,rw "$mount"; done
        [ -z "$mounts" ] || systemctl daemon-reexec'
}

kill_machine() {
    local folder=$MACHINES/$1
    disown "$(cat "$folder/nspawn")" # so that the shell does not report its end
    kill -KILL "$(cat "$folder/leader")" "$(cat "$folder/nspawn")"
    wait_for 20 ended "$(cat "$folder/nspawn")"
    wait_for 20 umount "$folder/root"
    ip netns del "drp-$1"
}

stop_machines() {
    local folder name hierarchy
    for folder in "$MACHINES"/*/; do
        [ -e "$folder/nspawn" ] || continue
        name=$(basename "$folder")
        on "$name" systemctl --no-block poweroff >/dev/null 2>&1 || true
    done
    for folder in "$MACHINES"/*/; do
        [ -e "$folder/root" ] || continue
        name=$(basename "$folder")
        if [ -e "$folder/nspawn" ]; then
            # Killing only nspawn would leave the machine running, so its PID 1 is killed too.
            wait_for 20 ended "$(cat "$folder/nspawn")" || kill -KILL $(cat "$folder/leader" "$folder/nspawn") || true
            wait "$(cat "$folder/nspawn")" 2>/dev/null || true
        fi
        umount "$folder/root" && rm -rf "$folder"
        ip netns del "drp-$name" 2>/dev/null || true
        for hierarchy in $(cgroups); do
            find "$hierarchy/drp-$name" -depth -type d -exec rmdir {} + 2>/dev/null || true
        done
    done
    ip netns del "$SWITCH" 2>/dev/null || true
    ! mountpoint --quiet "$MACHINES" || umount "$MACHINES"
}

ended() { ! kill -0 "$1" 2>/dev/null; }

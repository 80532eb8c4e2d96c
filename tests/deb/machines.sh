# shellcheck shell=bash
# Machines that boot Debian 13 with systemd, as containers on a switch of their own: no packet leaves it. Source this.
#
#   make_tree                          make the tree that machines boot, if it is not there yet
#   network_up                         make the switch
#   start_machine NAME ADDRESS/24 [OPTION...]   boot a machine from an overlay of the tree, and wait until it is up;
#                                      the options are systemd-nspawn's
#   on NAME COMMAND...                 run a command on it
#   root_of NAME                       print where its files are
#   stop_machines                      end all of them, and the switch
#
# Needs root. It works where PID 1 is systemd and where it is not, with cgroups of version 1 and 2.

MACHINES=${MACHINES:?a folder for the machines}
TREE=${TREE:?the tree that they boot}
SWITCH=drp-switch

# What is in the tree, and what is downloaded for it: what the package depends on, for apt to install.
INSTALLED=systemd,systemd-sysv,dbus,libpam-systemd,libnss-systemd,iproute2,procps,avahi-daemon,libnss-mdns,ca-certificates,curl,docker.io,docker-cli,iptables,python3
LATER=python3-twisted,python3-openssl,python3-cryptography,python3-service-identity,python3-attr,python3-bcrypt

make_tree() { "$(dirname "${BASH_SOURCE[0]}")/../../tools/debian-root" "${TREE%/root}" "$INSTALLED" "$LATER"; }

root_of() { echo "$MACHINES/$1/root"; }

on() {
    local name=$1
    shift
    nsenter --target "$(cat "$MACHINES/$name/leader")" --all -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        LANG=C.UTF-8 TERM=dumb DEBIAN_FRONTEND=noninteractive SYSTEMD_PAGER= "$@"
}

network_up() {
    ip netns add "$SWITCH"
    # Without snooping, multicast (mDNS) reaches everybody: nobody here asks who wants it.
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
    rm -f "$folder"/root/etc/systemd/system/*.wants/docker.* # who needs dockerd starts it

    ip netns add "$namespace"
    ip -n "$SWITCH" link add "$port" type veth peer name host0 netns "$namespace"
    ip -n "$SWITCH" link set "$port" master br0 up
    ip -n "$namespace" link set lo up
    ip -n "$namespace" addr add "$address" dev host0
    ip -n "$namespace" link set host0 up

    # With --keep-unit a machine lives in the cgroup that it is started from: each needs its own.
    (
        join_cgroups "$name"
        exec setsid systemd-nspawn --quiet --directory="$folder/root" --machine="$name" --boot --register=no --keep-unit \
            --console=pipe --resolv-conf=off --timezone=off --link-journal=no \
            --network-namespace-path="/run/netns/$namespace" "$@" >"$folder/console" 2>&1 </dev/null
    ) &
    echo $! >"$folder/nspawn"
    if ! wait_for 60 is_up "$name"; then
        echo "$name did not boot:" >&2
        tail -n 30 "$folder/console" >&2
        return 1
    fi
    open_cgroups "$name"
}

# The machine's first process is nspawn's only child, once the one before it, which prepares things, has ended.
is_up() {
    pgrep --oldest --parent "$(cat "$MACHINES/$1/nspawn")" >"$MACHINES/$1/leader" || return
    [[ $(on "$1" systemctl is-system-running 2>/dev/null) =~ ^(running|degraded)$ ]]
}

# wait_for SECONDS COMMAND...: until the command succeeds
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
        for file in cpuset.cpus cpuset.mems; do # empty in a new group of version 1, which then takes no process
            if [ -e "$hierarchy/$file" ]; then
                cat "$hierarchy/$file" >"$hierarchy/drp-$1/$file"
            fi
        done
        echo "$BASHPID" >"$hierarchy/drp-$1/cgroup.procs"
    done
}

# nspawn mounts controllers of version 1 read-only, and what runs in the machine (dockerd) wants to write there.
open_cgroups() {
    # shellcheck disable=SC2016 # for the shell on the machine
    on "$1" sh -c 'mounts=$(awk "\$3 == \"cgroup\" && \$2 !~ /systemd/ {print \$2}" /proc/mounts)
        for mount in $mounts; do mount -o remount,bind,rw "$mount"; done
        [ -z "$mounts" ] || systemctl daemon-reexec'
}

stop_machines() {
    local folder name hierarchy
    for folder in "$MACHINES"/*/; do
        [ -e "$folder/nspawn" ] || continue
        name=$(basename "$folder")
        on "$name" systemctl --no-block poweroff >/dev/null 2>&1 || true
    done
    for folder in "$MACHINES"/*/; do
        [ -e "$folder/nspawn" ] || continue
        name=$(basename "$folder")
        wait_for 20 ended "$(cat "$folder/nspawn")" || kill -KILL "$(cat "$folder/nspawn")" || true
        wait "$(cat "$folder/nspawn")" 2>/dev/null || true
        umount "$folder/root" && rm -rf "$folder"
        ip netns del "drp-$name" 2>/dev/null || true
        for hierarchy in $(cgroups); do
            find "$hierarchy/drp-$name" -depth -type d -exec rmdir {} + 2>/dev/null || true
        done
    done
    ip netns del "$SWITCH" 2>/dev/null || true
}

ended() { ! kill -0 "$1" 2>/dev/null; }

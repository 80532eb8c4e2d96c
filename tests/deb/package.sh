#!/bin/bash
# Builds the package twice, under different conditions, and compares; has lintian look at it. Usage: package.sh FOLDER
# The .deb of the first build, in which the tests ran, is left in FOLDER.
set -euo pipefail

project=$(realpath "$(dirname "$0")/../..")
folder=$(realpath -m "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$project/tools/apt-install" xz=xz-utils cmp=diffutils
"$project/tools/build-deb" "$folder"
echo "built: $(basename "$folder"/*.deb)"

# Again from the source package, which also shows that it holds everything.
mkdir "$scratch/source"
tar -C "$scratch/source" --strip-components=1 -xf "$folder"/*.tar.xz
BUILD_SOURCE=$scratch/source BUILD_PATH=/build/some/longer/path BUILD_UMASK=077 BUILD_TZ=Asia/Kolkata BUILD_LANG=C \
    BUILD_CLOCK='+400 days' DEB_BUILD_OPTIONS=nocheck "$project/tools/build-deb" "$scratch/again"
cmp "$folder"/*.deb "$scratch/again"/*.deb
echo "built again in another folder, with another umask, time zone, locale and clock: identical"

# In the tree that it was built in, with what was built as /build.
in_tree() {
    systemd-nspawn --quiet --register=no --keep-unit --console=pipe --private-network --link-journal=no --resolv-conf=off \
        --timezone=off --read-only --tmpfs=/tmp --directory="$tree" --bind="$scratch:/build" \
        /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C.UTF-8 "$@" >"$scratch/log" 2>&1 </dev/null
}
fail() {
    tail -n 60 "$scratch/log" >&2
    echo "$1 is not content" >&2
    exit 1
}
tree=$project/.cache/debian/build/root
cp "$folder"/*.{changes,dsc,tar.xz,deb,buildinfo} "$scratch"

# By what it prints: its exit status counts what is overridden as well.
in_tree sh -c 'lintian --allow-root --pedantic --display-info --fail-on=none /build/*.changes && echo finished' || fail lintian
if ! grep -q '^finished$' "$scratch/log" || grep -q '^[A-Z]:' "$scratch/log"; then
    fail lintian
fi
echo "lintian has nothing to say"

# In a copy of the tree, which has all that the package depends on: so this needs no network. systemd-sysusers leaves its
# lock file behind, as on every system.
tar -C "$tree" --one-file-system -cf "$scratch/base.tar" .
in_tree piuparts --basetgz=/build/base.tar --keep-sources-list --no-eatmydata --no-upgrade-test \
    --ignore=/etc/.pwd.lock --tmpdir=/build /build/"$(basename "$folder"/*.deb)" || fail piuparts
grep -q 'PASS: All tests' "$scratch/log" || fail piuparts
echo "piuparts finds nothing left behind"

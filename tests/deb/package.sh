#!/bin/bash
# Builds the package twice under different conditions, compares the results, and runs lintian and piuparts.
# Usage: package.sh FOLDER
#
# The .deb of the first build, during which the tests ran, is left in FOLDER.
set -euo pipefail

project=$(realpath "$(dirname "$0")/../..")
folder=$(realpath -m "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$project/tools/apt-install" xz=xz-utils cmp=diffutils
"$project/tools/build-deb" "$folder"
echo "built: $(basename "$folder"/*.deb)"

# The second build uses the source package, which also checks that it is complete.
mkdir "$scratch/source"
tar -C "$scratch/source" --strip-components=1 -xf "$folder"/*.tar.xz
BUILD_SOURCE=$scratch/source BUILD_PATH=/build/some/longer/path BUILD_UMASK=077 BUILD_TZ=Asia/Kolkata BUILD_LANG=C \
    BUILD_CLOCK='+400 days' DEB_BUILD_OPTIONS=nocheck "$project/tools/build-deb" "$scratch/again"
cmp "$folder"/*.deb "$scratch/again"/*.deb
echo "built again in another folder, with another umask, time zone, locale and clock: identical"

# Runs a command in the tree of the build, with the built files in /build.
in_tree() {
    systemd-nspawn --quiet --register=no --keep-unit --console=pipe --private-network --link-journal=no --resolv-conf=off \
        --timezone=off --read-only --tmpfs=/tmp --directory="$tree" --bind="$scratch:/build" \
        /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C.UTF-8 "$@" >"$scratch/log" 2>&1 </dev/null
}
fail() {
    tail -n 60 "$scratch/log" >&2
    echo "$1 has failed or found problems; its output is above" >&2
    exit 1
}
tree=$project/.cache/debian/build/root
cp "$folder"/*.{changes,dsc,tar.xz,deb,buildinfo} "$scratch"

# The result is read from the output, because the exit status also counts overridden tags.
in_tree sh -c 'lintian --allow-root --pedantic --display-info --fail-on=none /build/*.changes && echo finished' || fail lintian
if ! grep -q '^finished$' "$scratch/log" || grep -q '^[A-Z]:' "$scratch/log"; then
    fail lintian
fi
echo "lintian: no problems"

# piuparts uses a copy of the tree, which has all dependencies of the package, so it needs no network. systemd-sysusers
# leaves its lock file behind, as on every system.
tar -C "$tree" --one-file-system -cf "$scratch/base.tar" .
in_tree piuparts --basetgz=/build/base.tar --keep-sources-list --no-eatmydata --no-upgrade-test \
    --ignore=/etc/.pwd.lock --tmpdir=/build /build/"$(basename "$folder"/*.deb)" || fail piuparts
grep -q 'PASS: All tests' "$scratch/log" || fail piuparts
echo "piuparts: no files are left behind"

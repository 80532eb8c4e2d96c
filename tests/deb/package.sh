#!/bin/bash
# Builds the package twice, under different conditions, and compares; has lintian look at it. Usage: package.sh FOLDER
# The .deb of the first build, in which the tests ran, is left in FOLDER.
set -euo pipefail

project=$(realpath "$(dirname "$0")/../..")
folder=$(realpath -m "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$project/tools/build-deb" "$folder"
echo "built: $(basename "$folder"/*.deb)"

# Again from the source package, which also shows that it holds everything.
mkdir "$scratch/source"
tar -C "$scratch/source" --strip-components=1 -xf "$folder"/*.tar.xz
BUILD_SOURCE=$scratch/source BUILD_PATH=/build/some/longer/path BUILD_UMASK=077 BUILD_TZ=Asia/Kolkata BUILD_LANG=C \
    BUILD_CLOCK='+400 days' DEB_BUILD_OPTIONS=nocheck "$project/tools/build-deb" "$scratch/again"
cmp "$folder"/*.deb "$scratch/again"/*.deb
echo "built again in another folder, with another umask, time zone, locale and clock: identical"

# By what it prints: its exit status counts what is overridden as well.
cp "$folder"/*.{changes,dsc,tar.xz,deb,buildinfo} "$scratch"
systemd-nspawn --quiet --register=no --keep-unit --console=pipe --private-network --link-journal=no --resolv-conf=off \
    --timezone=off --read-only --tmpfs=/tmp --directory="$project/.cache/debian/build/root" --bind-ro="$scratch:/build" \
    /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C.UTF-8 \
    sh -c 'lintian --allow-root --pedantic --display-info --fail-on=none /build/*.changes && echo finished' \
    >"$scratch/lintian" </dev/null
if ! grep -q '^finished$' "$scratch/lintian" || grep -E '^[A-Z]:' "$scratch/lintian"; then
    echo "lintian is not content" >&2
    exit 1
fi
echo "lintian has nothing to say"

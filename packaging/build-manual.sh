#!/bin/sh
# Builds the package pss-manual, the commands under the names of the manual, into the directory OUT.
set -eu

if [ $# -ne 1 ]; then
    echo "Usage: $0 OUT" >&2
    exit 2
fi
out=$1
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$here/../Cargo.toml" | head -n 1)
if [ -z "$version" ]; then
    echo "$0: Cargo.toml has no version" >&2
    exit 1
fi

mkdir -p "$out"
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
cp -R -P "$here/manual/." "$tree"
chmod -R u=rwX,go=rX "$tree"
chmod 755 "$tree/etc/init.d/pssd"
sed "s/@VERSION@/$version/" "$here/manual/DEBIAN/control" >"$tree/DEBIAN/control"
dpkg-deb --build --root-owner-group "$tree" "$out/pss-manual_${version}_all.deb"

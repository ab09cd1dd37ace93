#!/bin/bash
# All tests: formatting, lints, and every test of the workspace. See docs/testing.md.
set -euo pipefail
cd "$(dirname "$0")"

# Debian package and the program (or, with a slash, the file of Perl's library) that shows that it is
# there. The tests drive PSS with clients that
# others wrote; without one of them they would prove less, so a missing one is an error.
needed=(
    "nbdkit nbdkit"
    "nbd-client nbd-client"
    "nbd-server nbd-server"
    "libnbd-bin nbdinfo"
    "python3-libnbd nbdsh"
    "fio fio"
    "qemu-utils qemu-img"
    "e2fsprogs mke2fs"
    "strace strace"
    "libiscsi-bin iscsi-test-cu"
    "libconfig-general-perl Config/General.pm"
)

missing_packages() {
    local entry package program
    for entry in "${needed[@]}"; do
        read -r package program <<<"$entry"
        # System administration programs are not in everybody's PATH.
        if [[ $program == */* ]]; then
            perl -e 'exit !grep { -e "$_/$ARGV[0]" } @INC' "$program" || echo "$package"
        else
            PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || echo "$package"
        fi
    done
}

mapfile -t missing < <(missing_packages)
if ((${#missing[@]} > 0)) && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "== installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; } ||
        true
    mapfile -t missing < <(missing_packages)
fi
if ((${#missing[@]} > 0)); then
    echo "These packages are needed by the tests and are not installed:" >&2
    echo "    apt-get install ${missing[*]}" >&2
    exit 1
fi
export PATH="$PATH:/usr/sbin:/sbin"
if [[ $(id -u) != 0 ]]; then
    echo "== not root: the tests of full and of failing disks will fail (they mount and trace); run this with sudo env \"PATH=\$PATH\"" >&2
fi

started=$SECONDS
echo "== cargo fmt"
cargo fmt --all --check
echo "== cargo clippy"
cargo clippy --workspace --all-targets -- -D warnings
# The tests of pss-tests run the programs of the other packages, which cargo test does not build.
echo "== cargo build"
cargo build --workspace
echo "== cargo test"
cargo test --workspace --no-fail-fast
echo "== all tests passed in $((SECONDS - started)) s"

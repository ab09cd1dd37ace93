#!/bin/bash
# All tests: formatting, lints, and every test of the workspace; with --all also Linux's own initiator in a guest,
# which takes four minutes more. See docs/testing.md.
set -euo pipefail
cd "$(dirname "$0")"

# Debian package and the program (or file, or with a slash within, the file of Perl's library) that shows
# that it is there. The tests drive PSS with clients that
# others wrote; without one of them they would prove less, so a missing one is an error.
needed=(
    "nbdkit nbdkit"
    "nbd-client nbd-client"
    "nbd-server nbd-server"
    "libnbd-bin nbdinfo"
    "python3-libnbd nbdsh"
    "fio fio"
    "qemu-utils qemu-img"
    "qemu-block-extra /usr/lib/x86_64-linux-gnu/qemu/block-iscsi.so"
    "e2fsprogs mke2fs"
    "strace strace"
    "iproute2 ip"
    "fuse3 fusermount3"
    "rsync rsync"
    "qemu-system-x86 qemu-system-x86_64"
    "ipxe-qemu /usr/lib/ipxe/qemu/pxe-e1000.rom"
    "libiscsi-bin iscsi-test-cu"
    "tshark tshark"
    "libconfig-general-perl Config/General.pm"
)

case "${1:-}" in
    "") all=false ;;
    --all) all=true ;;
    *)
        echo "usage: $0 [--all]" >&2
        exit 2
        ;;
esac

missing_packages() {
    local entry package program
    for entry in "${needed[@]}"; do
        read -r package program <<<"$entry"
        # System administration programs are not in everybody's PATH.
        if [[ $program == /* ]]; then
            [[ -e $program ]] || echo "$package"
        elif [[ $program == */* ]]; then
            perl -e 'exit !grep { -e "$_/$ARGV[0]" } @INC' "$program" || echo "$package"
        else
            PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || echo "$package"
        fi
    done
}

# Packages as apt-get takes them. QEMU's come in one version only: where qemu-utils is newer than what
# the rest is to be had in, apt would rather remove it.
to_install() {
    local package version
    version=$(apt-cache madison qemu-block-extra 2>/dev/null | awk 'NR == 1 { print $3 }')
    for package in "$@"; do
        case $package in
            qemu-*) ;;
            *) echo "$package" ;;
        esac
    done
    if [[ " $* " == *" qemu-"* ]]; then
        printf "%s${version:+=$version}\n" qemu-utils qemu-block-extra qemu-system-x86
    fi
}

install() {
    mapfile -t packages < <(to_install "$@")
    apt-get install -y -qq --allow-downgrades --no-install-recommends "${packages[@]}" >/dev/null
}

mapfile -t missing < <(missing_packages)
if ((${#missing[@]} > 0)) && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "== installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    install "${missing[@]}" 2>/dev/null || { apt-get update -qq && install "${missing[@]}"; } || true
    mapfile -t missing < <(missing_packages)
fi
if ((${#missing[@]} > 0)); then
    echo "These packages are needed by the tests and are not installed:" >&2
    echo "    apt-get install ${missing[*]}" >&2
    exit 1
fi
export PATH="$PATH:/usr/sbin:/sbin"
if [[ $(id -u) != 0 ]]; then
    echo "== not root: the tests of full and of failing disks and the chaos will fail (they mount, trace and make network namespaces); run this with sudo env \"PATH=\$PATH\"" >&2
fi

started=$SECONDS
echo "== cargo fmt"
cargo fmt --all --check
echo "== cargo clippy"
cargo clippy --workspace --all-targets -- -D warnings
# The tests of pss-tests run the programs of the other packages, which cargo test does not build.
echo "== cargo build"
cargo build --workspace
echo "== tests"
# A run in the background may have been told to ignore SIGINT, which programs inherit; tests send it.
env --default-signal=INT cargo run --quiet -p pss-tests --bin suite
echo "== examples in the documentation"
cargo test --workspace --doc --quiet
if $all; then
    echo "== 200 power cuts"
    cargo test -p pss-tests --test power_cut -- --ignored
    echo "== Linux's own initiator"
    cargo test -p pss-tests --test linux_initiator -- --ignored
fi
echo "== all tests passed in $((SECONDS - started)) s"

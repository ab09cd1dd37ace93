#!/bin/bash
# Makes the guest of tests/tests/linux_initiator.rs: Debian's kernel, and an initramfs of Debian's open-iscsi,
# multipath-tools, sg3-utils, fio and makers of file systems.
#
#     tests/guest/build.sh DIRECTORY
#
# Packages are downloaded once into DIRECTORY/packages; without that directory they are downloaded anew. What
# is made is DIRECTORY/vmlinuz and DIRECTORY/initramfs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
# Two tests at the same time make one guest.
exec 9>lock
flock 9

# What the guest runs comes from these, and from the libraries that they depend on.
packages=(busybox-static open-iscsi multipath-tools sg3-utils sg3-utils-udev fio xfsprogs e2fsprogs nbd-client
    util-linux udev dmsetup kpartx)
programs=(iscsid iscsiadm multipath multipathd sg_inq sg_luns sg_opcodes sg_persist sg_readcap sg_vpd
    sg_get_lba_status sg_rtpg nbd-client fio mkfs.xfs xfs_repair mke2fs e2fsck blkdiscard blockdev udevadm scsi_id dmsetup
    kpartx)
modules=(virtio_pci virtio_net nbd iscsi_tcp sd_mod sg dm-multipath dm-round-robin dm-service-time xfs ext4
    crc32c-intel crc32c_generic)
# Debian's loader and glibc look for this one only when a thread is cancelled.
libraries=(libgcc_s.so.1)

say() { echo "guest: $*" >&2; }
fail() {
    say "$*"
    exit 1
}

for program in apt-get apt-cache dpkg-deb; do
    command -v "$program" >/dev/null || fail "$program is missing: the guest is made of Debian's packages"
done

# Packages that a package needs, as far as they are libraries: programs of the guest are named above.
needed_libraries() {
    apt-cache show --no-all-versions "$@" 2>/dev/null |
        sed -nE 's/^(Pre-)?Depends: //p' | tr ',' '\n' | sed -E 's/[|(].*//; s/:any//; s/ //g' |
        grep -E '^(lib|zlib1g$)' | sort -u
}

all_packages() {
    local kernel all new found
    kernel=$(apt-cache show --no-all-versions linux-image-cloud-amd64 2>/dev/null |
        sed -nE 's/^Depends: (linux-image-[^ ,]*).*/\1/p')
    [[ -n $kernel ]] || return 1
    all=$(printf '%s\n' "${packages[@]}" | sort)
    new=$all
    while [[ -n $new ]]; do
        # shellcheck disable=SC2086
        found=$(needed_libraries $new)
        new=$(comm -13 <(echo "$all") <(echo "$found"))
        all=$(printf '%s\n' "$all" "$found" | sort -u)
    done
    printf '%s\n' "$kernel" "$all"
}

download() {
    local names missing=() name
    names=$(all_packages) || {
        # Lists of packages are there after the first 'apt-get update'.
        apt-get update -qq >&2 || true
        names=$(all_packages) || fail "no Debian kernel is known to apt-cache: run 'apt-get update'"
    }
    mkdir -p packages
    for name in $names; do
        compgen -G "packages/${name}_*.deb" >/dev/null || missing+=("$name")
    done
    ((${#missing[@]} == 0)) && return
    say "downloading ${#missing[@]} packages"
    (cd packages && apt-get download -qq "${missing[@]}" >apt.log 2>&1) ||
        { apt-get update -qq >&2 && (cd packages && apt-get download -qq "${missing[@]}" >apt.log 2>&1); } ||
        fail "apt-get download failed: $(tail -3 packages/apt.log)"
}

# Copies a file into the guest under its own name, and the files that its links lead to.
put() {
    local from=$1 to
    while :; do
        mkdir -p "guest$(dirname "$from")"
        [[ -e guest$from || -L guest$from ]] || cp -P "unpacked$from" "guest$from"
        [[ -L unpacked$from ]] || break
        to=$(readlink "unpacked$from")
        [[ $to == /* ]] || to=$(dirname "$from")/$to
        from=$(realpath -ms "$to")
    done
}

# Libraries of a program, by the loader of the guest itself.
libraries_of() {
    local lib=$PWD/unpacked/lib/x86_64-linux-gnu usr=$PWD/unpacked/usr/lib/x86_64-linux-gnu
    local path=$lib:$usr:$usr/ceph:$PWD/unpacked/lib
    "$lib/ld-linux-x86-64.so.2" --inhibit-cache --library-path "$path" --list "$1" 2>&1 |
        sed -nE 's/.*=> (.*) \(0x.*/\1/p; s/.*not found.*/&/p; s/.*error while loading.*/& not found/p'
}

make_root() {
    local file name library list version module
    rm -rf unpacked guest
    mkdir -p unpacked guest/{bin,sbin,etc/iscsi,dev,proc,sys,run,tmp,mnt,root,var/lib,usr/bin,usr/sbin}
    for file in packages/*.deb; do
        dpkg-deb -x "$file" unpacked
    done
    cp unpacked/bin/busybox guest/bin/busybox
    local wanted=()
    for name in "${programs[@]}"; do
        file=$(cd unpacked && find bin sbin usr/bin usr/sbin lib/udev -name "$name" | head -1)
        [[ -n $file ]] || fail "$name is in none of the packages"
        wanted+=("/$file")
    done
    for file in unpacked/lib/multipath/*.so; do
        wanted+=("${file#unpacked}")
    done
    for library in "${libraries[@]}"; do
        wanted+=("$(cd unpacked && find lib usr/lib -name "$library" | sed 's,^,/,' | head -1)")
    done
    for file in "${wanted[@]}"; do
        put "$file"
        list=$(libraries_of "unpacked$file")
        [[ $list != *"not found"* ]] || fail "$file lacks a library: $list"
        while read -r library; do
            [[ -z $library ]] || put "${library#"$PWD/unpacked"}"
        done <<<"$list"
    done
    put /lib64/ld-linux-x86-64.so.2
    put /lib/x86_64-linux-gnu/ld-linux-x86-64.so.2
    ln -sf mke2fs guest/sbin/mkfs.ext4
    ln -sf /bin/udevadm guest/sbin/systemd-udevd
    cp unpacked/etc/mke2fs.conf guest/etc/
    cp unpacked/etc/iscsi/iscsid.conf guest/etc/iscsi/
    mkdir -p guest/lib/udev/rules.d guest/lib/udev/hwdb.d
    for file in 50-udev-default 55-dm 55-scsi-sg3_id 56-dm-mpath 58-scsi-sg3_symlink 60-block 60-multipath \
        60-persistent-storage 60-persistent-storage-dm 95-dm-notify; do
        put "/lib/udev/rules.d/$file.rules"
    done

    version=$(basename unpacked/lib/modules/*)
    for module in "${modules[@]}"; do
        add_module "$version" "$module"
    done
    mkdir -p "guest/lib/modules/$version"
    : >"guest/lib/modules/$version/modules.builtin"
    unpacked/bin/busybox depmod -b "$PWD/guest" "$version" 2>depmod.log || fail "depmod: $(cat depmod.log)"
    cp "unpacked/boot/vmlinuz-$version" vmlinuz
}

# Puts a module and those that it needs into the guest; ones that are part of the kernel are there.
add_module() {
    local version=$1 name=$2 file need
    grep -qE "/$(tr _ - <<<"$name" | sed 's/-/[-_]/g')\.ko$" "unpacked/lib/modules/$version/modules.builtin" && return
    file=$(find "unpacked/lib/modules/$version" -name '*.ko' | grep -E "/${name//[-_]/[-_]}\.ko$" || true)
    [[ -n $file ]] || fail "the kernel has no module $name"
    [[ ! -e guest${file#unpacked} ]] || return 0
    mkdir -p "guest$(dirname "${file#unpacked}")"
    cp "$file" "guest${file#unpacked}"
    need=$(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p' | tr ',' ' ')
    for need in $need; do
        add_module "$version" "$need"
    done
}

archive() { (cd "$1" && find . | "$OLDPWD/unpacked/bin/busybox" cpio -o -H newc 2>/dev/null); }

stamp=$(sha256sum <"$here/build.sh")
if [[ ! -e base.cpio || ! -e vmlinuz || $(cat stamp 2>/dev/null) != "$stamp" ]]; then
    rm -f stamp
    download
    say "making the guest"
    make_root
    archive guest >base.cpio
    echo "$stamp" >stamp
fi
# The scripts go in a second archive behind the first: to change them takes no time.
rm -rf scripts
mkdir scripts
cp "$here/init" "$here/steps.sh" scripts/
chmod +x scripts/init
cp base.cpio initramfs.new
archive scripts >>initramfs.new
mv initramfs.new initramfs

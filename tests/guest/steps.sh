# What Linux's own initiator does with a cell before it, step by step. Sourced by init, which has set portal0
# and portal1 (gateways of one cell). Each step prints "STEP name ok" or "STEP name FAIL reason"; "HOST what" asks the
# test to do something outside of the guest, whose effect the step waits for.

BASE=iqn.2001-03.jp.tritech
NAME=iqn.2001-03.jp.tritech:guest

# Runs a function of the step's name; the first command that fails ends it. What it did is shown before the result.
step() {
    output=$(
        exec 2>&1
        set -eux
        "step_$1"
    )
    code=$?
    if [ $code = 0 ]; then
        echo "STEP $1 ok"
    else
        echo "$output" | sed 's/^/    /'
        dmesg | tail -n 6 | sed 's/^/    kernel: /'
        # A step that failed must not stand in the way of the next.
        clean_up >/dev/null 2>&1
        echo "STEP $1 FAIL ($code) $(echo "$output" | tail -n 2 | tr '\n' ' ')"
    fi
}

clean_up() {
    umount /mnt
    multipath -F
    iscsiadm -m node -u
}

# Waits until a command succeeds, for some seconds.
wait_for() {
    { set +x; } 2>/dev/null
    local end=$(($(date +%s) + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        if [ "$(date +%s)" -ge $end ]; then
            echo "waited in vain for: $*"
            "$@"
            return 1
        fi
        sleep 0.2
    done
    set -x
}

# Runs a command that must fail. With "!" the shell would go on if it did not.
fails() {
    if "$@"; then
        echo "succeeded: $*"
        return 1
    fi
}

# Runs a command that must fail with this exit code.
fails_with() {
    local expected=$1 code=0
    shift
    "$@" || code=$?
    [ $code = "$expected" ]
}

set_node() {
    local target=$1
    shift
    while [ $# -gt 0 ]; do
        iscsiadm -m node -T "$BASE:$target" -p "${portal:-$portal0}" -o update -n "$1" -v "$2"
        shift 2
    done
}
# The code of a login that failed is what some steps are about.
login() {
    iscsiadm -m node -T "$BASE:$1" -p "${portal:-$portal0}" --login || return $?
    udevadm settle
}
logout() {
    iscsiadm -m node -T "$BASE:$1" -p "${portal:-$portal0}" --logout || return $?
    udevadm settle
}
# The device of a LUN, by the name that udev gives it.
device() { readlink -f "/dev/disk/by-path/ip-${portal:-$portal0}-iscsi-$BASE:$1-lun-$2"; }
has_device() { [ -b "$(device "$1" "$2")" ]; }

# --- discovery

step_discovery() {
    iscsiadm -m discovery -t sendtargets -p "$portal0" >/tmp/found
    cat /tmp/found
    for target in open chap mutual multi; do
        grep -qx "$portal0,1 $BASE:$target" /tmp/found
    done
    [ "$(wc -l </tmp/found)" = 4 ]
}

discover_with() {
    local record="iscsiadm -m discoverydb -t sendtargets -p $portal1"
    $record -o new
    while [ $# -gt 0 ]; do
        $record -o update -n "discovery.sendtargets.auth.$1" -v "$2"
        shift 2
    done
    # 24: the target refused the initiator.
    $record --discover
}

# The second gateway wants to know who asks, and must say who it is.
step_discovery_without_chap_is_refused() {
    fails_with 24 discover_with authmethod None
}
step_discovery_with_a_wrong_secret_is_refused() {
    fails_with 24 discover_with authmethod CHAP username carol password carolsecret2
}
step_discovery_with_chap() {
    discover_with authmethod CHAP username carol password carolsecret1 >/tmp/found
    grep -qx "$portal1,2 $BASE:multi" /tmp/found
}
step_discovery_with_mutual_chap() {
    discover_with authmethod CHAP username carol password carolsecret1 \
        username_in dave password_in davesecret123 >/tmp/found
    grep -qx "$portal1,2 $BASE:multi" /tmp/found
}
step_discovery_of_a_false_target_is_refused() {
    # 19: a fatal login error, which is what it is called when the initiator refuses the target.
    fails_with 19 discover_with authmethod CHAP username carol password carolsecret1 \
        username_in dave password_in davesecret124
}

# --- CHAP

auth() {
    local target=$1 name
    shift
    set_node "$target" node.session.auth.authmethod CHAP
    for name in username password username_in password_in; do
        [ $# -gt 0 ] || break
        set_node "$target" "node.session.auth.$name" "$1"
        shift
    done
}

step_chap_missing_is_refused() { fails_with 24 login chap; }
step_chap_wrong_user_is_refused() {
    auth chap alicia alicesecret1
    fails_with 24 login chap
}
step_chap_wrong_secret_is_refused() {
    auth chap alice alicesecret2
    fails_with 24 login chap
}
step_chap_one_way() {
    auth chap alice alicesecret1
    login chap
    wait_for 10 has_device chap 1
    write_and_compare "$(device chap 1)"
    logout chap
}
step_chap_mutual() {
    auth mutual alice alicesecret1 bob bobsecret1234
    login mutual
    wait_for 10 has_device mutual 1
    write_and_compare "$(device mutual 1)"
    logout mutual
}
# The initiator ends a login in which the target cannot prove itself.
step_chap_mutual_false_target_is_refused() {
    auth mutual alice alicesecret1 bob bobsecret1235
    fails_with 19 login mutual
}

# Writes 4 MiB of random bytes past the page cache and reads them back.
write_and_compare() {
    dd if=/dev/urandom of=/tmp/random bs=1M count=4
    dd if=/tmp/random of="$1" bs=256k oflag=direct
    dd if="$1" of=/tmp/back bs=512k count=8 iflag=direct
    cmp /tmp/random /tmp/back
}

# --- digests

digest() {
    set_node open "node.conn[0].iscsi.HeaderDigest" "$1" "node.conn[0].iscsi.DataDigest" "$2"
    login open
    # What was agreed on, not what was asked for.
    [ "$(cat /sys/class/iscsi_connection/connection*/header_digest)" = "$3" ]
    [ "$(cat /sys/class/iscsi_connection/connection*/data_digest)" = "$4" ]
    wait_for 10 has_device open 1
    write_and_compare "$(device open 1)"
    logout open
}
step_digests_none() { digest None None 0 0; }
step_digests_header() { digest CRC32C None 1 0; }
step_digests_data() { digest None CRC32C 0 1; }
step_digests_both() { digest CRC32C CRC32C 1 1; }
step_digests_preferred() { digest CRC32C,None None,CRC32C 1 0; }

# --- file systems

file_system() {
    local make=$1 check=$2 type=$3 lun=$4
    login open
    wait_for 10 has_device open "$lun"
    $make "$(device open "$lun")"
    mount -t "$type" "$(device open "$lun")" /mnt
    cp -a /usr /lib /etc /mnt/
    umount /mnt
    logout open
    echo 3 >/proc/sys/vm/drop_caches
    login open
    wait_for 10 has_device open "$lun"
    $check "$(device open "$lun")"
    mount -t "$type" "$(device open "$lun")" /mnt
    for tree in usr lib etc; do
        diff -r "/$tree" "/mnt/$tree"
    done
    [ "$(find /mnt/usr /mnt/lib -type f | wc -l)" -gt 100 ]
    rm -r /mnt/usr
    umount /mnt
    $check "$(device open "$lun")"
    logout open
}
step_ext4() { file_system "mkfs.ext4 -q -F" "e2fsck -fn" ext4 1; }
step_xfs() { file_system "mkfs.xfs -q -f" "xfs_repair -n" xfs 2; }

# --- thin provisioning, resize

step_discard() {
    login open
    wait_for 10 has_device open 1
    local disk
    disk=$(device open 1)
    [ "$(cat "/sys/block/${disk#/dev/}/queue/discard_max_bytes")" -gt 0 ]
    [ "$(cat "/sys/block/${disk#/dev/}/queue/write_zeroes_max_bytes")" -gt 0 ]
    write_and_compare "$disk"
    # Not busybox's. The middle of what was written, then everything, then zeroes written by the disk.
    /sbin/blkdiscard -o 1M -l 2M "$disk"
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/zero of=/tmp/random bs=1M count=2 seek=1 conv=notrunc
    dd if="$disk" bs=1M count=4 iflag=direct of=/tmp/back
    cmp /tmp/random /tmp/back
    sg_get_lba_status --lba=4096 "$disk" | grep -q deallocated
    /sbin/blkdiscard "$disk"
    dd if=/dev/zero of=/tmp/random bs=1M count=4
    dd if="$disk" bs=1M count=4 iflag=direct of=/tmp/back
    cmp /tmp/random /tmp/back
    write_and_compare "$disk"
    /sbin/blkdiscard -z -o 0 -l 4M "$disk"
    dd if=/dev/zero of=/tmp/random bs=1M count=4
    dd if="$disk" bs=1M count=4 iflag=direct of=/tmp/back
    cmp /tmp/random /tmp/back
    logout open
}

has_bytes() {
    iscsiadm -m session -R
    [ "$(blockdev --getsize64 "$(device open 1)")" = "$1" ]
}
step_resize() {
    login open
    wait_for 10 has_device open 1
    has_bytes 536870912
    echo "HOST resize" >/dev/ttyS0
    wait_for 60 has_bytes 805306368
    # What is new can be used.
    dd if=/dev/urandom of=/tmp/random bs=1M count=1
    dd if=/tmp/random of="$(device open 1)" bs=1M seek=767 oflag=direct
    dd if="$(device open 1)" of=/tmp/back bs=1M skip=767 count=1 iflag=direct
    cmp /tmp/random /tmp/back
    logout open
}

# --- SCSI

step_vpd() {
    login open
    wait_for 10 has_device open 1
    local disk page
    disk=$(device open 1)
    sg_vpd --page=sv "$disk" >/tmp/pages
    cat /tmp/pages
    for page in sv sn di ei mpp bl bdc lbpv; do
        grep -q "\[$page\]" /tmp/pages
        sg_vpd --page=$page "$disk"
    done
    # A page that is not there is refused, without ending the session.
    fails sg_vpd --page=0xb9 "$disk"
    sg_vpd --page=di "$disk" | grep -q "NAA"
    sg_vpd --page=lbpv "$disk" | grep -q "Unmap command supported (LBPU): 1"
    sg_inq "$disk"
    sg_luns "$disk" >/tmp/luns
    cat /tmp/luns
    # The controller and two disks.
    [ "$(grep -cE "^ *000[0-2]0{12}" /tmp/luns)" = 3 ]
    sg_readcap --16 "$disk" | grep -q "lbpme=1"
    sg_rtpg --decode "$disk"
    logout open
}

step_opcodes() {
    login open
    wait_for 10 has_device open 1
    local disk code
    disk=$(device open 1)
    sg_opcodes "$disk" >/tmp/opcodes
    cat /tmp/opcodes
    # READ(16), WRITE(16), COMPARE AND WRITE, UNMAP, PERSISTENT RESERVE OUT, SYNCHRONIZE CACHE(10), EXTENDED COPY
    for code in 88 8a 89 42 5f 35 83; do
        grep -qi "^ *$code " /tmp/opcodes
    done
    sg_opcodes --opcode=0x89 "$disk"
    sg_opcodes --tmf "$disk"
    logout open
}

# Two sessions by two gateways are two nexuses: a reservation made on one is held against the other.
step_persistent_reservations() {
    local first second
    login multi
    portal=$portal1 login multi
    wait_for 10 has_device multi 1
    first=$(device multi 1)
    second=$(portal=$portal1 device multi 1)
    [ -b "$second" ]
    [ "$first" != "$second" ]
    sg_persist --out --register --param-sark=0xa1 "$first"
    sg_persist --in --read-keys "$second" | grep -q 0xa1
    # 5: write exclusive, registrants only
    sg_persist --out --reserve --param-rk=0xa1 --prout-type=5 "$first"
    sg_persist --in --read-reservation "$second" | grep -q "Write Exclusive, registrants only"
    dd if=/dev/zero of="$first" bs=64k count=1 oflag=direct
    dd if="$second" of=/dev/null bs=64k count=1 iflag=direct
    fails dd if=/dev/zero of="$second" bs=64k count=1 oflag=direct
    # 24: reservation conflict
    fails_with 24 sg_persist --out --release --param-rk=0xa1 --prout-type=5 "$second"
    sg_persist --out --register --param-sark=0xb2 "$second"
    dd if=/dev/zero of="$second" bs=64k count=1 oflag=direct
    sg_persist --in --read-full-status "$first"
    sg_persist --out --preempt --param-rk=0xb2 --param-sark=0xa1 --prout-type=5 "$second"
    fails dd if=/dev/zero of="$first" bs=64k count=1 oflag=direct
    sg_persist --in --read-keys "$first" >/tmp/keys
    grep -q 0xb2 /tmp/keys
    fails grep -q 0xa1 /tmp/keys
    sg_persist --out --clear --param-rk=0xb2 "$second"
    dd if=/dev/zero of="$first" bs=64k count=1 oflag=direct
    sg_persist --in --read-reservation "$first" | grep -q "there is NO reservation"
    logout multi
    portal=$portal1 logout multi
}

# --- NBD, by the kernel

attach_nbd() {
    nbd-client "${nbd%:*}" "${nbd#*:}" /dev/nbd0 -N v "$@"
    wait_for 10 test -e /sys/block/nbd0/pid
}
detach_nbd() {
    nbd-client -d /dev/nbd0
    udevadm settle
}

step_nbd() {
    modprobe nbd
    attach_nbd -C 4
    [ "$(blockdev --getsize64 /dev/nbd0)" = 268435456 ]
    mkfs.ext4 -q -F /dev/nbd0
    mount -t ext4 /dev/nbd0 /mnt
    cp -a /usr /mnt/
    # The rest while there is no leader for a moment.
    echo "HOST leader" >/dev/ttyS0
    cp -a /lib /etc /mnt/
    sync
    umount /mnt
    detach_nbd
    echo 3 >/proc/sys/vm/drop_caches
    attach_nbd
    e2fsck -fn /dev/nbd0
    mount -t ext4 /dev/nbd0 /mnt
    for tree in usr lib etc; do
        diff -r "/$tree" "/mnt/$tree"
    done
    rm -r /mnt/usr /mnt/lib
    fstrim -v /mnt
    umount /mnt
    write_and_compare /dev/nbd0
    /sbin/blkdiscard /dev/nbd0
    dd if=/dev/zero of=/tmp/random bs=1M count=4
    dd if=/dev/nbd0 bs=1M count=4 iflag=direct of=/tmp/back
    cmp /tmp/random /tmp/back
    detach_nbd
    [ ! -e /sys/block/nbd0/pid ]
}

# --- multipath

cat >/etc/multipath.conf <<'END'
defaults {
    find_multipaths no
    user_friendly_names no
    polling_interval 1
    max_polling_interval 2
    path_grouping_policy multibus
    no_path_retry 30
}
END

# As many paths are in this state.
paths() { [ "$(multipathd show paths raw format "%t %o" | grep -c "^$1 $2")" = "$3" ]; }

step_multipath() {
    local name
    modprobe dm-multipath
    multipathd
    for portal in "$portal0" "$portal1"; do
        set_node multi node.session.timeo.replacement_timeout 3 \
            "node.conn[0].timeo.noop_out_interval" 1 "node.conn[0].timeo.noop_out_timeout" 2
        login multi
    done
    portal=
    wait_for 20 paths active running 2
    # One disk by two paths.
    [ "$(multipathd show maps raw format "%n" | wc -l)" = 1 ]
    multipath -ll
}

step_multipath_gateway_killed() {
    local name
    name=$(multipathd show maps raw format "%n")
    [ -b "/dev/mapper/$name" ]
    # For 14 s; then everything is read and compared.
    fio --name=verify --filename="/dev/mapper/$name" --rw=randwrite --bs=4k --size=32m \
        --iodepth=16 --ioengine=libaio --direct=1 --rate_iops=,600 \
        --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 --output=/tmp/fio.out &
    local fio=$!
    sleep 4
    echo "HOST kill" >/dev/ttyS0
    wait_for 30 paths failed running 1 || wait_for 1 paths failed offline 1
    kill -0 $fio
    wait $fio
    cat /tmp/fio.out
    grep -q "READ: .*io=32.0MiB" /tmp/fio.out
    multipath -ll
    echo "HOST start" >/dev/ttyS0
    # The initiator logs in again by itself, and multipathd takes the path again.
    wait_for 60 paths active running 2
    multipath -ll
}

step_multipath_ended() {
    multipath -F
    multipathd shutdown
    logout multi
    portal=$portal1 logout multi
    fails iscsiadm -m session
}

# --- all that the test asks for

echo "InitiatorName=$NAME" >/etc/iscsi/initiatorname.iscsi
sed -i 's/^iscsid.startup.*/iscsid.startup = iscsid/' /etc/iscsi/iscsid.conf
iscsid

# shellcheck disable=SC2154 # on the kernel's command line
for name in $(echo "$steps" | tr ',' ' '); do
    start=$(date +%s)
    step "$name"
    echo "    $name took $(($(date +%s) - start)) s"
done

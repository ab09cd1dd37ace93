#!/usr/bin/env bash
# Starts or stops a fresh cell of three pssd and one gateway for a benchmark, as processes of their own.
#
#   BENCH_DIR=DIR BENCH_SIZE=BYTES cell.sh start     prints one line of JSON: uri, pids and so on
#   BENCH_DIR=DIR cell.sh stop
#
# BIN names the directory of the binaries (default: target/release of this checkout), NET the first three
# parts of the loopback addresses, PORT the gateway's port, FRONT the gateway: nbd (default) or iscsi.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
bin=${BIN:-$here/target/release}
net=${NET:-127.0.77}
port=${PORT:-10977}
front=${FRONT:-nbd}
dir=${BENCH_DIR:?names the directory for the data}
conf=$dir/server.conf

stop() {
  [ -f "$dir/pids" ] || return 0
  # The gateway first, then the servers; only what this script started.
  for pid in $(tac "$dir/pids"); do kill "$pid" 2>/dev/null || true; done
  for pid in $(cat "$dir/pids"); do
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
    kill -9 "$pid" 2>/dev/null || true
  done
  rm -rf "$dir"/server-? "$dir/pids"
}

case ${1:-} in
  stop) stop ;;
  start)
    stop
    mkdir -p "$dir"
    for id in 0 1 2; do echo "$id $net.1$id $dir/server-$id"; done > "$conf"
    for id in 0 1 2; do
      "$bin/pssd" format --servers "$conf" --id "$id" >"$dir/pssd-$id.log" 2>&1
      "$bin/pssd" start --servers "$conf" --id "$id" >>"$dir/pssd-$id.log" 2>&1 </dev/null &
      echo $! >> "$dir/pids"
    done
    size=${BENCH_SIZE:-4294967296}
    for _ in $(seq 100); do
      "$bin/pss" --servers "$conf" volume create vol0 "$size" >"$dir/create.log" 2>&1 && break
      sleep 0.1
    done
    if [ "$front" = iscsi ]; then
      iqn=iqn.2026-11.test.pss:bench
      printf '<target %s>\n  <backing-store vol0>\n    bs-type pss\n    lun 1\n  </backing-store>\n</target>\n' \
        "$iqn" > "$dir/targets.conf"
      "$bin/pss-iscsi" --servers "$conf" --config "$dir/targets.conf" --portal "127.0.0.1:$port" \
        --control "$dir/iscsi.sock" >"$dir/pss-iscsi.log" 2>&1 </dev/null &
      uri=iscsi://127.0.0.1:$port/$iqn/1
    else
      "$bin/pss-nbd" --servers "$conf" --listen "127.0.0.1:$port" >"$dir/pss-nbd.log" 2>&1 </dev/null &
      uri=nbd://127.0.0.1:$port/vol0
    fi
    echo $! >> "$dir/pids"
    for _ in $(seq 100); do
      (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
      sleep 0.05
    done
    read -r -d '' a b c d < <(tr '\n' ' ' < "$dir/pids"; printf '\0') || true
    printf '{"uri":"%s","pids":{"%s":"pssd","%s":"pssd","%s":"pssd","%s":"pss-%s"},' \
      "$uri" "$a" "$b" "$c" "$d" "$front"
    printf '"copies":3,"ack":"majority, durable"}\n'
    ;;
  *) echo "usage: BENCH_DIR=DIR $0 start|stop" >&2; exit 2 ;;
esac

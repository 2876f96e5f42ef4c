#!/usr/bin/env bash
# A real S3 server for tests: Ceph's radosgw over one monitor and one in-memory
# OSD, all on loopback and below one directory.
#
#   tools/radosgw.sh start DIR    start it, or find it running; prints "endpoint access_key secret_key"
#   tools/radosgw.sh stop DIR     end exactly the processes that start began
#   tools/radosgw.sh status DIR   say whether it runs (exit status 0, else 3)
#
# start writes DIR/env with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
# AWS_SECRET_ACCESS_KEY, AWS_REGION and TEST_S3_BUCKET, and makes that bucket.
# A server that no start has asked for within RADOSGW_IDLE_S seconds (1800)
# stops itself. Nothing is installed here; what is missing is named.
set -euo pipefail

BUCKET=boilerhouse-test
IDLE_S=${RADOSGW_IDLE_S:-1800}
PACKAGES='radosgw ceph-mon ceph-osd python3'
DAEMONS='mon osd rgw watch'

fail() {
    echo "radosgw.sh: $*" >&2
    exit 1
}

need_tools() {
    local tool missing=''
    for tool in radosgw radosgw-admin ceph-mon ceph-osd ceph ceph-authtool monmaptool python3 setsid flock; do
        command -v "$tool" >/dev/null || missing+=" $tool"
    done
    [ -z "$missing" ] || fail "not found:$missing; install them with: apt-get install -y --no-install-recommends $PACKAGES"
}

# The time a process began, which tells it from another with the same number.
began() { # PID
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086
    set -- ${stat##*) }
    [ "$1" != Z ] || return 1
    echo "${20}"
}

is_ours() { # NAME: is the process of that name the one that was recorded?
    local pid since
    [ -r "$dir/$1.pid" ] || return 1
    read -r pid since <"$dir/$1.pid" || return 1
    [ "$(began "$pid")" = "$since" ]
}

run() { # NAME COMMAND...: begin a process that outlives this script, and record it
    local name=$1 pid
    shift
    setsid "$@" </dev/null >"$dir/log/$name.out" 2>&1 9>&- &
    pid=$!
    echo "$pid $(began "$pid")" >"$dir/$name.pid"
}

wait_for() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "$what; see $dir/log"
        sleep 0.1
    done
}

answers() { # PORT
    python3 -c '
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
opener.open(f"http://127.0.0.1:{sys.argv[1]}/", timeout=5)' "$1" 2>/dev/null
}

make_bucket() { # PORT BUCKET; "ACCESS SECRET" on stdin, so that no process's arguments hold it
    python3 -c '
import datetime, hashlib, hmac, sys, urllib.request
port, bucket = sys.argv[1:]
access, secret = sys.stdin.read().split()
host, region = f"127.0.0.1:{port}", "us-east-1"
now = datetime.datetime.utcnow().strftime("%Y%m%dT%H%M%SZ")
body = hashlib.sha256(b"").hexdigest()
names = "host;x-amz-content-sha256;x-amz-date"
headers = f"host:{host}\nx-amz-content-sha256:{body}\nx-amz-date:{now}\n"
request = f"PUT\n/{bucket}\n\n{headers}\n{names}\n{body}"
scope = f"{now[:8]}/{region}/s3/aws4_request"
text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
key = ("AWS4" + secret).encode()
for part in scope.split("/"):
    key = hmac.new(key, part.encode(), hashlib.sha256).digest()
signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(urllib.request.Request(
    f"http://{host}/{bucket}", method="PUT", headers={
        "x-amz-content-sha256": body, "x-amz-date": now,
        "Authorization": f"AWS4-HMAC-SHA256 Credential={access}/{scope}, SignedHeaders={names}, Signature={signature}",
    }), timeout=60)' "$1" "$2"
}

is_running() {
    local name
    [ -r "$dir/env" ] && [ -r "$dir/rgw.port" ] || return 1
    for name in mon osd rgw; do
        is_ours "$name" || return 1
    done
    answers "$(cat "$dir/rgw.port")"
}

stop_all() {
    local name pid round
    for name in $DAEMONS; do
        if is_ours "$name"; then
            read -r pid _ <"$dir/$name.pid"
            [ "$pid" = $$ ] || kill -TERM "$pid" 2>/dev/null || true
        fi
    done
    for name in $DAEMONS; do
        for round in $(seq 100); do
            is_ours "$name" || break
            read -r pid _ <"$dir/$name.pid"
            [ "$pid" != $$ ] || break
            [ "$round" -lt 50 ] || kill -KILL "$pid" 2>/dev/null || true
            sleep 0.1
        done
        rm -f "$dir/$name.pid"
    done
    rm -rf "$dir/env" "$dir/rgw.port" "$dir/data"
}

configure() { # MON_PORT RGW_PORT
    cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $(python3 -c 'import uuid; print(uuid.uuid4())')
mon_initial_members = a
mon_host = v1:127.0.0.1:$1
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_bind_msgr2 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 2
osd_objectstore = memstore
memstore_device_bytes = 4294967296
run_dir = $dir/data
admin_socket =
crash_dir = $dir/data
keyring = $dir/data/keyring
log_file = $dir/log/\$name.log
pid_file =
[mon]
mon_data = $dir/data/mon
[osd]
osd_data = $dir/data/osd
monmap = $dir/data/monmap
osd_class_update_on_start = false
osd_crush_update_on_start = false
[client.rgw]
monmap = $dir/data/monmap
rgw_data = $dir/data/rgw
rgw_frontends = beast endpoint=127.0.0.1:$2 tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_enable_gc_threads = false
rgw_enable_lc_threads = false
rgw_run_sync_thread = false
CONF
}

start_new() {
    local mon_port rgw_port fsid osd access secret conf=(-c "$dir/ceph.conf")
    stop_all
    mkdir -p "$dir/log" "$dir/data/mon" "$dir/data/osd" "$dir/data/rgw"
    read -r mon_port rgw_port < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
    configure "$mon_port" "$rgw_port"
    fsid=$(sed -n 's/^fsid = //p' "$dir/ceph.conf")
    access=$(python3 -c 'import secrets; print(secrets.token_hex(10).upper())')
    secret=$(python3 -c 'import secrets; print(secrets.token_urlsafe(30))')
    {
        monmaptool --create --fsid "$fsid" --addv a "[v1:127.0.0.1:$mon_port]" "$dir/data/monmap"
        ceph-authtool --create-keyring "$dir/data/keyring" --gen-key -n mon. --cap mon 'allow *'
        ceph-authtool "$dir/data/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *'
        ceph-authtool "$dir/data/keyring" --gen-key -n client.rgw --cap mon 'allow *' --cap osd 'allow *'
        ceph-mon "${conf[@]}" --mkfs -i a --monmap "$dir/data/monmap" --keyring "$dir/data/keyring"
    } >"$dir/log/setup.out" 2>&1 || fail "the monitor cannot be made; see $dir/log/setup.out"
    run mon ceph-mon "${conf[@]}" -i a -f
    wait_for 60 'the monitor does not answer' ceph "${conf[@]}" --connect-timeout 5 -s
    {
        osd=$(python3 -c 'import uuid; print(uuid.uuid4())')
        ceph "${conf[@]}" osd new "$osd" 0
        ceph-osd "${conf[@]}" -i 0 --mkfs --osd-uuid "$osd"
        ceph "${conf[@]}" osd crush add osd.0 1.0 root=default host=h
    } >>"$dir/log/setup.out" 2>&1 || fail "the OSD cannot be made; see $dir/log/setup.out"
    run osd ceph-osd "${conf[@]}" -i 0 -f
    # The first command that needs a pool waits for the OSD by itself.
    timeout 120 radosgw-admin "${conf[@]}" user create --uid test --display-name test \
        --access-key "$access" --secret-key "$secret" >>"$dir/log/setup.out" 2>&1 ||
        fail "the user cannot be made; see $dir/log/setup.out"
    run rgw radosgw "${conf[@]}" -n client.rgw -f
    wait_for 60 'radosgw does not answer' answers "$rgw_port"
    make_bucket "$rgw_port" "$BUCKET" <<<"$access $secret" >>"$dir/log/setup.out" 2>&1 ||
        fail "the bucket cannot be made; see $dir/log/setup.out"
    echo "$rgw_port" >"$dir/rgw.port"
    (
        umask 077
        cat >"$dir/env.new" <<ENV
AWS_ENDPOINT_URL=http://127.0.0.1:$rgw_port
AWS_ACCESS_KEY_ID=$access
AWS_SECRET_ACCESS_KEY=$secret
AWS_REGION=us-east-1
TEST_S3_BUCKET=$BUCKET
ENV
    )
    mv "$dir/env.new" "$dir/env"
    run watch "$self" watch "$dir" "$(cat "$dir/mon.pid" "$dir/osd.pid" "$dir/rgw.pid")"
}

lock() {
    exec 9>"$dir/lock"
    flock -w 300 9 || fail "another start or stop of $dir does not end"
}

[ $# -ge 2 ] || fail 'usage: radosgw.sh {start|stop|status} DIR'
self=$(realpath "$0")
dir=$(realpath -m "$2")

case $1 in
start)
    need_tools
    mkdir -p "$dir"
    lock
    touch "$dir/wanted"
    is_running || start_new
    # shellcheck disable=SC1091
    . "$dir/env"
    echo "$AWS_ENDPOINT_URL $AWS_ACCESS_KEY_ID $AWS_SECRET_ACCESS_KEY"
    ;;
stop)
    [ -d "$dir" ] || exit 0
    lock
    stop_all
    ;;
status)
    if is_running; then
        echo "running at http://127.0.0.1:$(cat "$dir/rgw.port")"
    else
        echo 'not running'
        exit 3
    fi
    ;;
watch)
    while sleep 5 && [ -e "$dir/wanted" ]; do
        [ $(($(date +%s) - $(stat -c %Y "$dir/wanted"))) -lt "$IDLE_S" ] || break
    done
    if [ -d "$dir" ]; then
        lock
        stop_all
    else
        # Someone removed the directory below the server, and the records with it.
        while read -r pid since; do
            [ "$(began "$pid")" != "$since" ] || kill -KILL "$pid" || true
        done <<<"$3"
    fi
    ;;
*) fail "unknown command $1; usage: radosgw.sh {start|stop|status} DIR" ;;
esac

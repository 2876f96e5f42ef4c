#!/usr/bin/env bash
# Shows the main job on real parts: a server with its embedded defaults, a real
# container claimed, state written inside it, released, claimed again, the state
# there. Prints what happens; exits with 1 and the server's log when it does not.
#
# Everything it makes is below one temporary directory and carries one
# installation's label; both are gone afterwards, however it ends.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly READY_S=120    # until the server says ready, its pool filled
readonly REQUEST_S=60   # one request
readonly STOP_S=30      # the server's own shutdown
readonly PULL_S=60      # the default image from a registry
readonly LOCAL_IMAGE=boilerhouse-demo:local

if [ "$(id -u)" != 0 ]; then
  # shellcheck disable=SC2016 # The reader's shell is to expand it.
  echo 'demo: the server gives files to the users that containers run as, so it runs as root: sudo env "PATH=$PATH" make demo' >&2
  exit 1
fi

# The defaults are what is shown: no setting of this shell takes part.
unset "${!BOILERHOUSE_@}"

dir=$(mktemp -d "${TMPDIR:-/tmp}/boilerhouse-demo.XXXXXX")
instance=demo-$$
server=
image_is_ours=

cleanup() {
  local status=$?
  trap - EXIT
  if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server" 2>/dev/null || true
    local until=$((SECONDS + STOP_S))
    while kill -0 "$server" 2>/dev/null && [ "$SECONDS" -lt "$until" ]; do sleep 0.1; done
    kill -KILL "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  if [ "$status" -ne 0 ] && [ -s "$dir/server.log" ]; then
    printf '\n--- the server'\''s log ---\n' >&2
    tail -n 80 "$dir/server.log" >&2
  fi
  docker ps --all --quiet --filter "label=boilerhouse.instance=$instance" |
    xargs --no-run-if-empty docker rm --force --volumes >/dev/null 2>&1 || true
  [ -z "$image_is_ours" ] || docker rmi --force "$LOCAL_IMAGE" >/dev/null 2>&1 || true
  rm -rf "$dir"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() { printf '\n%s\n' "$*"; }
note() { printf '   %s\n' "$*"; }
fail() {
  printf '\ndemo: %s\n' "$*" >&2
  exit 1
}

# --- reading answers -------------------------------------------------------
# The answers are compact JSON without nested objects of the same name, so that
# two greps do where a JSON tool may not be installed. Absent is empty.

object() { grep -oE "\"$2\":\{[^{}]*\}" <<<"$1" | head -n 1 || true; }
value() { grep -oE "\"$2\":(\"[^\"]*\"|[0-9.]+)" <<<"$1" | head -n 1 | sed -E 's/^"[^"]*"://; s/^"//; s/"$//' || true; }

post() { # PATH BODY
  local answer status
  answer=$(curl -sS --max-time "$REQUEST_S" -X POST -H 'content-type: application/json' \
    -d "$2" -w '\n%{http_code}' "$url$1") || fail "POST $1 did not get an answer"
  status=${answer##*$'\n'}
  answer=${answer%$'\n'*}
  [ "$status" = 200 ] || fail "POST $1 was answered with $status: $answer"
  printf '%s' "$answer"
}

show_claim() { # ANSWER
  note "container  $(value "$(object "$1" container)" name)"
  note "slot       $(value "$1" source), epoch $(value "$1" epoch)"
  note "state      from: $(value "$(object "$1" state)" source)"
  note "timings    $(object "$1" timings_ms | sed -E 's/^"timings_ms"://; s/[{}"]//g; s/,/, /g; s/:/ /g') (ms)"
}

# --- 1 the server ----------------------------------------------------------

step "1. Building the server (the first build takes a few minutes)"
cargo build --locked --quiet
note "target/debug/boilerhouse"

image=alpine:latest
if ! docker image inspect "$image" >/dev/null 2>&1 &&
  ! timeout "$PULL_S" docker pull --quiet "$image" >/dev/null 2>&1; then
  note "the default image $image cannot be pulled here: using this machine's busybox as $LOCAL_IMAGE"
  if ! docker image inspect "$LOCAL_IMAGE" >/dev/null 2>&1; then
    mkdir -p "$dir"/root/{bin,etc,tmp}
    cp "$(command -v busybox)" "$dir/root/bin/busybox"
    while read -r applet; do
      [ "$applet" = busybox ] || ln -s busybox "$dir/root/bin/$applet"
    done < <(busybox --list)
    echo 'root:x:0:0:root:/:/bin/sh' >"$dir/root/etc/passwd"
    echo 'root:x:0:' >"$dir/root/etc/group"
    tar -C "$dir/root" -c . | docker import --change 'CMD ["/bin/sh"]' - "$LOCAL_IMAGE" >/dev/null
    image_is_ours=yes
  fi
  export BOILERHOUSE_DEFAULT_IMAGE=$LOCAL_IMAGE
  image=$LOCAL_IMAGE
fi

step "2. Starting it, with two warm containers of $image"
mkdir "$dir/workloads" "$dir/scripts"
export BOILERHOUSE_API_PORT=0
export BOILERHOUSE_POOL_SIZE=2
export BOILERHOUSE_INSTANCE=$instance
export BOILERHOUSE_STATE_DIR=$dir/states
export BOILERHOUSE_SECRETS_DIR=$dir/secrets
export BOILERHOUSE_SOCKET_DIR=$dir/sockets
export BOILERHOUSE_STORE=file://$dir/store
export BOILERHOUSE_WORKLOADS_DIR=$dir/workloads
export BOILERHOUSE_SCRIPTS_DIR=$dir/scripts
NO_COLOR=1 target/debug/boilerhouse serve >"$dir/server.log" 2>&1 &
server=$!

# With port 0 the server logs the address it got.
url=
until=$((SECONDS + READY_S))
while [ "$SECONDS" -lt "$until" ]; do
  kill -0 "$server" 2>/dev/null || fail "the server ended"
  if [ -z "$url" ]; then
    address=$(grep -oE '127\.0\.0\.1:[1-9][0-9]*' "$dir/server.log" | head -n 1 || true)
    [ -z "$address" ] || url=http://$address
  fi
  if [ -n "$url" ]; then
    ready=$(curl -sS --max-time 5 "$url/readyz" 2>/dev/null || true)
    pools=$(curl -sS --max-time 5 "$url/pools" 2>/dev/null || true)
    [ "$(value "$ready" status)" = ready ] && [ "$(value "$pools" ready)" = 2 ] && break
  fi
  sleep 0.2
done
[ -n "$url" ] || fail "the server did not say where it listens"
[ "$(value "$ready" status)" = ready ] || fail "the server is not ready: $ready"
[ "$(value "$pools" ready)" = 2 ] || fail "the pool has not filled: $pools"
note "$url is ready, $(value "$pools" ready) containers wait, no tenant is in any of them"
workloads=$(curl -sS --max-time 5 "$url/workloads")
state_path=$(value "$(object "$workloads" state)" container_path)
[ -n "$state_path" ] || fail "the default workload has no state directory: $workloads"

# --- 2 claim, write, release -----------------------------------------------

step "3. Claiming a container for the tenant \"demo\": POST /tenants/demo/claim"
claim=$(post /tenants/demo/claim '{}')
container=$(value "$(object "$claim" container)" name)
[ -n "$container" ] || fail "the answer names no container: $claim"
show_claim "$claim"

step "4. Writing state inside the container, as its own user"
text="written in $container"
# shellcheck disable=SC2016 # The container's shell is to expand it.
docker exec "$container" sh -c 'echo "$1" >"$2/hello.txt" && mkdir -p "$2/notes" && date >"$2/notes/when"' \
  demo "$text" "$state_path" || fail "the container could not write to $state_path"
note "$state_path/hello.txt: $text"

step "5. Releasing it: POST /tenants/demo/release"
release=$(post /tenants/demo/release '{}')
note "$release"
[ "$(value "$release" state)" = durable ] || fail "the state is not durable"
note "durable: the state is in the store and was read back. The store's files:"
(cd "$dir/store" && find . -type f -printf '     %8s bytes  %P\n' | sort -k 3)
[ -n "$(find "$dir/store" -type f -size +0 -print -quit)" ] || fail "the store is empty"

# --- 3 claim again ---------------------------------------------------------

step "6. Claiming for \"demo\" again"
claim=$(post /tenants/demo/claim '{}')
second=$(value "$(object "$claim" container)" name)
show_claim "$claim"
[ "$second" != "$container" ] || fail "the same container served two claims"
# shellcheck disable=SC2016
read_back=$(docker exec "$second" sh -c 'cat "$1/hello.txt"' demo "$state_path") || fail "the state is not there"
note "$state_path/hello.txt: $read_back"
[ "$read_back" = "$text" ] || fail "the state differs from what was written"
note "another container, the same state"

release=$(post /tenants/demo/release '{}')
[ "$(value "$release" state)" = durable ] || fail "the second release is not durable: $release"

step "Done. Try it yourself: README.md, \"Quick start\"."

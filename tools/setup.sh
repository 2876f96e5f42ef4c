#!/usr/bin/env bash
# Makes sure that what `make demo` or `make test` needs is there.
#
#   tools/setup.sh demo    Rust, a C compiler, curl, Docker (answering), busybox
#   tools/setup.sh test    all of that, git, Ceph's radosgw as a real S3 server, and
#                          what the shipped workloads run (Redis, Python)
#
# As root on Debian or Ubuntu it installs what is missing and starts a Docker
# daemon that does not answer. Anywhere else it names what is missing and exits
# with 1. Quick, and without effect, when everything is there.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly RUST_MINOR=95          # rust-version in Cargo.toml: 1.95
readonly DOCKER_ANSWER_S=10     # one question to the daemon
readonly DOCKER_START_S=60      # until a daemon that was started answers
readonly APT_LOCK_S=300         # until another apt-get is done

mode=${1:-test}
case "$mode" in
  demo | test) ;;
  *)
    echo "setup: unknown mode '$mode' (allowed: demo, test)" >&2
    exit 2
    ;;
esac

say() { printf 'setup: %s\n' "$*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- what is missing -------------------------------------------------------

# Set by look: Debian packages, and for people what each is wanted for.
packages=()
reasons=()

want() { # PACKAGES REASON
  local name
  for name in $1; do
    [[ " ${packages[*]} " == *" $name "* ]] || packages+=("$name")
  done
  reasons+=("$2")
}

# A dynamic busybox cannot run alone in an image.
busybox_is_static() {
  local path
  path=$(command -v busybox) || return 1
  ! ldd "$path" >/dev/null 2>&1
}

# Set when the daemon on the other side of DOCKER_HOST is not ours to install.
engine_is_elsewhere() {
  [ -n "${DOCKER_HOST:-}" ] && [ "$DOCKER_HOST" != unix:///var/run/docker.sock ]
}

look() {
  packages=()
  reasons=()
  { have cc && [ -e /usr/include/stdlib.h ]; } || want "gcc libc6-dev" "a C compiler and libc headers, for SQLite, zstd and ring"
  have curl || want "curl ca-certificates" "curl, to speak to the server"
  busybox_is_static || want "busybox-static" "a static busybox, for local test images"
  if ! have docker; then
    # Newer releases ship the client apart from the daemon.
    if have apt-cache && apt-cache show docker-cli >/dev/null 2>&1; then
      want "docker-cli" "the Docker client"
    else
      want "docker.io" "the Docker client"
    fi
  fi
  if ! engine_is_elsewhere && ! have dockerd && ! docker_answers; then
    want "docker.io" "the Docker engine"
  fi
  # With AppArmor on in the kernel, Docker starts nothing without its parser.
  if grep -qs Y /sys/module/apparmor/parameters/enabled && ! have apparmor_parser && ! docker_answers; then
    want "apparmor" "apparmor_parser, which Docker needs on this kernel"
  fi
  if [ "$mode" = test ]; then
    have git || want "git" "git, to list the tracked files"
    { have radosgw && have radosgw-admin; } || want "radosgw" "radosgw, the S3 server of the tests"
    { have ceph-mon && have monmaptool; } || want "ceph-mon" "ceph-mon, for radosgw"
    have ceph-osd || want "ceph-osd" "ceph-osd, for radosgw"
    # Paths of Debian: an interpreter from elsewhere need not be of one piece.
    { [ -x /usr/bin/redis-check-rdb ] && [ -x /usr/bin/redis-cli ]; } ||
      want "redis-tools" "/usr/bin/redis-check-rdb and redis-cli, for the shipped workload redis"
    /usr/bin/python3 -I -S -c 'import http.server' >/dev/null 2>&1 ||
      want "python3" "/usr/bin/python3 with http.server, for the shipped workload http-worker"
    have zstd || want "zstd" "zstd, for the tests' own reader of the state format"
    have sqlite3 || want "sqlite3" "sqlite3, to check databases that were restored"
  fi
}

check_rust() {
  if ! have cargo || ! have rustc; then
    say "cargo is missing. Install Rust 1.$RUST_MINOR or newer from https://rustup.rs and open a new shell."
    say "(Debian's own cargo is too old; if rustup is installed already, put ~/.cargo/bin into PATH.)"
    exit 1
  fi
  local version minor
  version=$(rustc --version | awk '{print $2}')
  minor=${version#1.}
  minor=${minor%%.*}
  if ! [ "$minor" -ge "$RUST_MINOR" ] 2>/dev/null; then
    say "rustc $version is too old, 1.$RUST_MINOR or newer is needed: rustup update stable"
    exit 1
  fi
}

# --- Docker ----------------------------------------------------------------

docker_answers() {
  have docker && timeout "$DOCKER_ANSWER_S" docker version --format '{{.Server.Version}}' >/dev/null 2>&1
}

wait_for_docker() { # SECONDS
  local until=$((SECONDS + $1))
  while [ "$SECONDS" -lt "$until" ]; do
    docker_answers && return 0
    sleep 0.5
  done
  return 1
}

start_docker() {
  if engine_is_elsewhere; then
    say "the Docker engine at DOCKER_HOST=$DOCKER_HOST does not answer; start it, or unset DOCKER_HOST"
    exit 1
  fi
  if [ "$(id -u)" != 0 ]; then
    say "the Docker engine does not answer to this user. Start it (sudo systemctl start docker), or"
    say "let this user reach it (sudo usermod -aG docker $(id -un), then log in again)."
    exit 1
  fi
  say "the Docker engine does not answer: starting it"
  if [ -d /run/systemd/system ] && have systemctl; then
    systemctl start docker >&2 || say "systemctl start docker failed"
  elif [ -x /etc/init.d/docker ] && have service; then
    service docker start >&2 || say "service docker start failed"
  fi
  wait_for_docker 20 && return 0
  if ! pidof dockerd >/dev/null 2>&1; then
    mkdir -p target
    say "starting dockerd by itself, log in target/dockerd.log"
    # A session of its own and no shared files: it outlives make and its terminal.
    setsid --fork dockerd >>target/dockerd.log 2>&1 </dev/null
  fi
  wait_for_docker "$DOCKER_START_S" && return 0
  say "the Docker engine did not answer within $DOCKER_START_S s after it was started"
  [ -s target/dockerd.log ] && tail -n 20 target/dockerd.log >&2
  exit 1
}

# --- installing ------------------------------------------------------------

is_debian_like() {
  have apt-get && grep -qsE '^(ID|ID_LIKE)=.*(debian|ubuntu)' /etc/os-release
}

apt() {
  DEBIAN_FRONTEND=noninteractive apt-get -o "DPkg::Lock::Timeout=$APT_LOCK_S" -y -qq "$@" >&2
}

# Package lists on a fresh machine are absent, on an old one stale: update only
# when an install without it does not work.
install_missing() {
  say "installing: ${packages[*]}"
  apt install --no-install-recommends "${packages[@]}" 2>/dev/null && return 0
  say "updating the package lists"
  apt update
  # What a package is called can depend on the lists (docker-cli).
  look
  [ "${#packages[@]}" -eq 0 ] || apt install --no-install-recommends "${packages[@]}"
}

check_rust
look
if [ "${#packages[@]}" -gt 0 ]; then
  if [ "$(id -u)" != 0 ] || ! is_debian_like; then
    say "missing:"
    printf '  - %s\n' "${reasons[@]}" >&2
    say "as packages of Debian and Ubuntu: sudo apt-get install --no-install-recommends ${packages[*]}"
    exit 1
  fi
  install_missing
  hash -r
  look
  if [ "${#packages[@]}" -gt 0 ]; then
    say "still missing after the installation:"
    printf '  - %s\n' "${reasons[@]}" >&2
    exit 1
  fi
fi
docker_answers || start_docker

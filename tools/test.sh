#!/usr/bin/env bash
# Runs everything that decides whether this tree is good: format, lints, docs,
# and every test, with a real Docker engine and a real S3 server.
#
# The test runner's own summary is the last thing printed, and its exit status
# the script's. Nothing is skipped: a part that is missing is an error.
#
#   TEST_S3_ENV   a file with AWS_* variables and a bucket, for an S3 server of
#                 your own; unset, radosgw is started below target/ and stopped
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n=== %s\n' "$*"; }

step "what the tests need"
tools/setup.sh test

step "format"
cargo fmt --check

step "lints"
cargo clippy --locked --all-targets --features crash_points -- -D warnings

step "docs"
RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --features crash_points --document-private-items

step "shipped image"
tools/image.sh
export TEST_IMAGE=${IMAGE:-boilerhouse:latest}

if [ -z "${TEST_S3_ENV:-}" ]; then
  step "S3 server"
  # Armed first: a start that fails half-way leaves daemons too.
  trap 'tools/radosgw.sh stop target/radosgw >/dev/null 2>&1 || true' EXIT
  tools/radosgw.sh start target/radosgw
  export TEST_S3_ENV=$PWD/target/radosgw/env
fi

# Apart and first, so that the last summary is that of tests.
step "tests in the docs"
cargo test --locked --doc --features crash_points

step "tests"
cargo test --locked --no-fail-fast --features crash_points --lib --bins --tests "$@"

#!/usr/bin/env bash
# Builds the container image boilerhouse:latest (or IMAGE), without a registry.
#
# The binary is linked statically on this machine and copied into an empty
# image; see Dockerfile for what is in it and why.
set -euo pipefail
cd "$(dirname "$0")/.."

image=${IMAGE:-boilerhouse:latest}
triple=$(rustc -vV | sed -n 's/^host: //p')

# With an explicit target, RUSTFLAGS do not reach proc macros and build
# scripts, which cannot be linked statically.
RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target "$triple" --bin boilerhouse

binary=target/$triple/release/boilerhouse
if ldd "$binary" 2>/dev/null | grep -q '=>'; then
  echo "image: $binary is not static; the image would not start:" >&2
  ldd "$binary" >&2
  exit 1
fi

# Laid out as it will be in the image.
root=target/image
rm -rf "$root"
mkdir -p "$root/etc/boilerhouse/workloads" "$root/etc/boilerhouse/scripts"
install -D -m 0755 "$binary" "$root/usr/bin/boilerhouse"
install -m 0644 LICENSE "$root/LICENSE"
for folder in workloads scripts; do
  [ ! -d "$folder" ] || cp -R "$folder/." "$root/etc/boilerhouse/$folder/"
done

docker build --quiet --tag "$image" . >target/image.id
printf 'image: %s %s, %s bytes\n' "$image" "$(cat target/image.id)" "$(docker image inspect --format '{{.Size}}' "$image")"

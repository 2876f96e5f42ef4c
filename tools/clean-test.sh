#!/usr/bin/env bash
# Removes containers that an interrupted test or demo left behind: those whose
# installation is named test-… or demo-…, and those labelled boilerhouse.test.
# A server's own containers carry another installation's name and stay.
set -euo pipefail

docker ps --all --format '{{.ID}}|{{.Label "boilerhouse.instance"}}|{{.Label "boilerhouse.test"}}' |
  awk -F '|' '$2 ~ /^(test|demo)-/ || $3 != "" { print $1 }' |
  xargs --no-run-if-empty docker rm --force --volumes

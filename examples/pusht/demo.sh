#!/usr/bin/env bash
# From a trained checkpoint to a robot that acts: export, verification, closed loop, a look at why.
set -euo pipefail
output=${1:-outputs/demo}
here=examples/pusht

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}
rm -rf "$output/episodes"
run vqbet-export $here/checkpoint --fp16 --verify-data $here/frames -o "$output/pusht-fp16.bundle" --force
run vqbet-export $here/checkpoint --int8 --calibration-data $here/frames -o "$output/pusht-int8.bundle" --force
run vqbet-eval "$output/pusht-int8.bundle" --env pusht_contact --episodes 20 --record "$output/episodes"
run vqbet-view "$output/episodes" -o "$output/demo.html"
run python -m examples.pusht "$output"

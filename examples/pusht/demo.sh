#!/usr/bin/env bash
# From a trained checkpoint to a robot that acts: export, verification, closed loop, a look at why.
set -euo pipefail
output=${1:-outputs/demo}
here=examples/pusht

say() {
    printf '\n$ %s\n' "$*" >&2
}
run() {
    say "$@"
    "$@"
}
# Besides what follows, on another core; what it prints goes to a file.
beside() {
    said=$1 && shift
    say "$@"
    OMP_NUM_THREADS=1 "$@" >"$said" 2>&1 </dev/null &
}
joined() {
    wait $! || { cat "$said" >&2 && exit 1; }
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

rm -rf "$output/episodes"
mkdir -p "$output"
# The reports are long; they lie in the bundles.
beside "$output/fp16.log" vqbet-export $here/checkpoint --fp16 --verify-data $here/frames \
    --output "$output/pusht-fp16.bundle" --force
run vqbet-export $here/checkpoint --int8 --target cpu --calibration-data $here/frames \
    --output "$output/pusht-int8.bundle" --force >"$output/int8.log"
joined
run vqbet-inspect "$output/pusht-fp16.bundle" --prove
run vqbet-inspect "$output/pusht-int8.bundle" --prove
beside "$output/codes.log" \
    vqbet-codes $here/checkpoint --data $here/frames --output "$output/codes.html"
run vqbet-eval "$output/pusht-int8.bundle" --env pusht_contact --episodes 20 --record "$output/episodes"
run vqbet-view "$output/episodes" --output "$output/demo.html"
joined
cat "$output/codes.log"
run python -m examples.pusht "$output"

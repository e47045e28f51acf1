#!/usr/bin/env bash
# From a trained checkpoint to a robot that acts: export, verification, closed loop, a look at why.
set -euo pipefail
output=${1:-outputs/demo}
here=examples/pusht

run() {
    printf '\n$ %s\n' "$*" >&2
    "$@"
}
rm -rf "$output/episodes"
mkdir -p "$output"
# The reports are long; they lie in the bundles.
for flags in "--fp16 --verify-data" "--int8 --calibration-data"; do
    precision=${flags:2:4}
    bundle=$output/pusht-$precision.bundle
    # shellcheck disable=SC2086
    run vqbet-export $here/checkpoint $flags $here/frames --output "$bundle" --force >"$output/$precision.log"
    run vqbet-inspect "$bundle" --prove
done
run vqbet-eval "$output/pusht-int8.bundle" --env pusht_contact --episodes 20 --record "$output/episodes"
run vqbet-view "$output/episodes" --output "$output/demo.html"
run vqbet-codes $here/checkpoint --data $here/frames --output "$output/codes.html"
run python -m examples.pusht "$output"

#!/bin/sh
# The whole way on a task of its own: demonstrations, training, export, driving with the bundle.
set -eu
output=${1:-outputs/demo}

echo "== 1/3 demonstrations and training" >&2
policy=$(python -m vqbet_edge.training.demo prepare --output "$output")
echo "== 2/3 export" >&2
vqbet-export "$policy" --fp16 --output "$output/detour-fp16.bundle" \
    --verify-data "$output/demonstrations" --force
echo "== 3/3 driving" >&2
python -m vqbet_edge.training.demo drive --policy "$output/detour-fp16.bundle" --output "$output"

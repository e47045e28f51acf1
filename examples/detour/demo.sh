#!/usr/bin/env bash
# From nothing to a robot that acts from a bundle: demonstrations, training, export, closed loop.
set -euo pipefail
output=${1:-outputs/detour}
bundle=$output/demo-fp16.bundle

policy=$(python -m examples.detour "$output")
vqbet-export "$policy" --fp16 --verify-data "$output/demonstrations" --output "$bundle" --force
python examples/control_loop.py "$bundle" "$output/demonstrations"
python -m examples.detour "$output" "$bundle"

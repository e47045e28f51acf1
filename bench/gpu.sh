#!/usr/bin/env bash
# Everything that needs a GPU, in one go, on a machine that has one:
#
#     bench/gpu.sh CHECKPOINT [DATASET] [RESULTS]
#
# CHECKPOINT: a directory with model.safetensors and config.json, or a Hub id.
# DATASET:    LeRobot data set whose frames are used (tests/data/pusht).
# RESULTS:    folder of the reports (bench/results).
#
# Nothing is installed. Wanted, and skipped with the reason where missing:
#     pip install -e '.[export,gpu,bench]' tensorrt-rtx
#     pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'
#     pip install --no-deps lerobot==0.4.4     # the peer in PyTorch, with what it imports
#
# It leaves gpu-NAME/ (vqbet-bench: every backend beside PyTorch), gpu-NAME-correctness.json,
# gpu-NAME-rtx.txt (does TensorRT for RTX run on this GPU?), gpu-NAME-layers-*.json (the engine
# inspector's layers), gpu-NAME-doctor.json.
set -uo pipefail
cd "$(dirname "$0")/.."

checkpoint=${1:?usage: bench/gpu.sh CHECKPOINT [DATASET] [RESULTS]}
dataset=${2:-tests/data/pusht}
results=${3:-bench/results}
python=${PYTHON:-python}
export PYTHONPATH=".:export:calibration:engines:bench${PYTHONPATH:+:$PYTHONPATH}"

name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' A-Z' '-a-z')
name=${name:?there is no NVIDIA GPU here}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
report=$results/gpu-$name
failures=0

step() { # DESCRIPTION COMMAND...: go on after a failure, remember it
    local description=$1
    shift
    echo "== $description" >&2
    "$@" || { echo "== failed ($?): $description" >&2; failures=$((failures + 1)); }
}
to_file() { # FILE COMMAND...: standard output into a file
    local file=$1
    shift
    "$@" >"$file"
}
exporter() { "$python" -c 'from vqbet_export.cli import main; main()' "$@"; }
doctor() { "$python" -c 'from vqbet_engines.doctor import main; main()' "$@"; }
builder() { "$python" -m vqbet_engines "$@"; }

step "what is installed" to_file "$report-doctor.json" doctor --json

bundles=()
for precision in fp32 fp16; do
    bundle=$work/$precision.bundle
    step "export $precision" to_file "$work/export.json" \
        exporter "$checkpoint" "--$precision" -o "$bundle" --verify-data "$dataset" --json
    [ -d "$bundle" ] && bundles+=("$bundle")
done
[ ${#bundles[@]} -gt 0 ] || { echo "nothing was exported" >&2; exit 1; }

# TensorRT for RTX lists SM75, SM80, SM86, SM89, SM120 and SM121: other GPUs have to be tried.
{
    for target in current sm80; do
        "$python" -m vqbet_bench.rtx_probe "${bundles[0]}" "$target" 2>&1 ||
            echo "$target: exit code $?"
    done
} | tee "$report-rtx.txt" >&2

for flavour in tensorrt tensorrt_rtx; do
    for bundle in "${bundles[@]}"; do
        step "build $(basename "$bundle") with $flavour" \
            to_file "$report-layers-$flavour-$(basename "$bundle" .bundle).json" \
            builder "$bundle" --flavour "$flavour" --force --json
    done
done
find "$results" -name "gpu-$name-layers-*.json" -empty -delete

step "compare every backend with the CPU" "$python" -m vqbet_bench.correctness \
    "${bundles[@]}" --dataset "$dataset" --output "$report-correctness.json"

bench() { # FOLDER: measure every backend beside PyTorch on the GPU
    "$python" -c 'from vqbet_bench.cli import main; main()' "${bundles[@]}" \
        --backend tensorrt tensorrt_rtx onnxruntime-cuda onnxruntime \
        --checkpoint "$checkpoint" --peer-device cuda --dataset "$dataset" --output "$1"
}
step "measure" bench "$report"
# The same without CUDA graphs: what they are worth.
VQBET_EDGE_CUDA_GRAPH=0 step "the same without CUDA graphs" bench "$report-no-graphs"

echo "reports: $report*; $failures step(s) failed" >&2
[ "$failures" -eq 0 ]

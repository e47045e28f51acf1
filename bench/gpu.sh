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
# It leaves gpu-NAME/ (vqbet-bench: every backend beside PyTorch), gpu-NAME-no-graphs/,
# gpu-NAME-proof-*.txt (ONNX Runtime on the GPU against the reference cases; engines are proven as
# they are built), gpu-NAME-build-*.json and gpu-NAME-doctor.json.
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
entry() { # MODULE ARGUMENT...: a command of this package
    local module=$1
    shift
    "$python" -c "from $module import main; main()" "$@"
}

step "what is installed" to_file "$report-doctor.json" entry vqbet_engines.doctor_command --json

bundles=()
for precision in fp32 fp16; do
    bundle=$work/$precision.bundle
    step "export $precision" to_file "$work/export.json" entry vqbet_export.cli \
        "$checkpoint" "--$precision" -o "$bundle" --verify-data "$dataset" --json
    [ -d "$bundle" ] && bundles+=("$bundle")
done
[ ${#bundles[@]} -gt 0 ] || { echo "nothing was exported" >&2; exit 1; }

# TensorRT for RTX lists SM75, SM80, SM86, SM89, SM120 and SM121: on others the engines are refused.
for flavour in tensorrt tensorrt_rtx; do
    for bundle in "${bundles[@]}"; do
        built=$report-build-$flavour-$(basename "$bundle" .bundle).json
        step "build $(basename "$bundle") with $flavour" to_file "$built" \
            entry vqbet_engines.build_command "$bundle" --flavour "$flavour" --force --json
        [ -s "$built" ] || rm -f "$built"
    done
done

for bundle in "${bundles[@]}"; do
    proof=$report-proof-$(basename "$bundle" .bundle).txt
    step "prove $(basename "$bundle")" to_file "$proof" \
        entry vqbet_edge.inspection "$bundle" --prove --backend onnxruntime-cuda
done

bench() { # FOLDER: measure every backend beside PyTorch on the GPU
    entry vqbet_bench.cli "${bundles[@]}" \
        --backend onnxruntime onnxruntime-cuda tensorrt tensorrt_rtx \
        --checkpoint "$checkpoint" --peer-device cuda --dataset "$dataset" --output "$1"
}
step "measure" bench "$report"
# The same without CUDA graphs: what they are worth.
VQBET_EDGE_CUDA_GRAPH=0 step "the same without CUDA graphs" bench "$report-no-graphs"

echo "reports: $report*; $failures step(s) failed" >&2
[ "$failures" -eq 0 ]

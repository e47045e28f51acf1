#!/usr/bin/env bash
# The robot's side on an emulated aarch64 processor: does what PyPI has for it install, prove bundles
# and act? On Debian, without root and without leaving anything outside WORK:
#
#     tools/aarch64.sh WORK [BUNDLE...]
#
# WORK:   folder for the emulator, an arm64 Python of Debian's, the wheels and, where no BUNDLE is
#         named, small ones in FP32, FP16 and INT8. What is there already is used again.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mkdir -p "${1:?usage: tools/aarch64.sh WORK [BUNDLE...]}" && cd "$1" && pwd)
shift
python=${PYTHON:-python3}
root=$work/root

# A private apt: arm64 as the machine's own, nothing installed, so it fetches all that Python needs.
arm64() {
    apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 \
        -o Dir::State="$work/apt" -o Dir::State::status="$work/apt/status" \
        -o Dir::Cache="$work/apt/cache" -o APT::Sandbox::User=root "$@"
}

if [ ! -x "$work/qemu/usr/bin/qemu-aarch64-static" ]; then
    echo "== fetching the emulator" >&2
    mkdir -p "$work/qemu"
    (cd "$work/qemu" && apt-get -qq -o APT::Sandbox::User=root download qemu-user-static)
    dpkg-deb -x "$work"/qemu/*.deb "$work/qemu"
fi
if [ ! -e "$root/done" ]; then
    echo "== fetching an arm64 Python" >&2
    mkdir -p "$work"/apt/lists/partial "$work"/apt/cache/archives/partial
    : >"$work/apt/status"
    arm64 update
    arm64 install --yes --no-install-recommends --download-only python3 libstdc++6 >/dev/null
    mkdir -p "$root"/usr/{bin,sbin,lib}
    for name in bin sbin lib; do ln -sfn "usr/$name" "$root/$name"; done
    for package in "$work"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    # ONNX Runtime reads which processor it is on, and crashes where it says x86: an Orin's.
    mkdir -p "$root/proc"
    for ((cpu = 0; cpu < $(nproc --all); cpu++)); do
        printf '%s\t: %s\n' processor "$cpu" \
            Features "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimddp" \
            "CPU implementer" 0x41 "CPU architecture" 8 "CPU variant" 0x0 "CPU part" 0xd42 \
            "CPU revision" 1
        echo
    done >"$root/proc/cpuinfo"
    touch "$root/done"
fi
emulated() { # ARGUMENT...: the arm64 Python
    "$work/qemu/usr/bin/qemu-aarch64-static" -cpu max -L "$root" \
        -E "PYTHONPATH=$work/site" -E PYTHONDONTWRITEBYTECODE=1 \
        -E "LD_LIBRARY_PATH=$root/usr/lib/aarch64-linux-gnu" "$root/usr/bin/python3" "$@"
}
version=$(emulated -c 'import sys; print("%d.%d" % sys.version_info[:2])')

echo "== installing .[cpu] for CPython $version on aarch64" >&2
rm -rf "$work/site" "$work/wheel"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheel" .
"$python" -m pip install --quiet --no-warn-conflicts --target "$work/site" --python-version "$version" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 --only-binary :all: "$(ls "$work"/wheel/*.whl)[cpu]"

if [ $# -eq 0 ]; then
    [ -d "$work/bundles" ] || "$python" tools/aarch64_bundles.py "$work/bundles"
    set -- "$work"/bundles/*.bundle
fi
echo "== acting, emulated" >&2
emulated tools/aarch64_robot.py "$@"

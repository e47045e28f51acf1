"""Small bundles in every precision, for machines that are not here.

    python tools/aarch64_bundles.py FOLDER

The INT8 one is calibrated on what the FP32 one's robot saw, which are random observations.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests", "export", "calibration", "engines", ".")]

import miniature  # noqa: E402

from vqbet_edge import EdgePolicy  # noqa: E402


def write(folder: Path) -> None:
    """FP32, FP16 and INT8."""
    folder.mkdir(parents=True)
    miniature.write(folder / "fp32.bundle", steps=32)
    miniature.write(folder / "fp16.bundle", steps=32, precision="fp16")
    random = np.random.default_rng(0)
    seen = folder / "seen"
    with EdgePolicy.load(folder / "fp32.bundle", "onnxruntime") as policy, policy.record(seen):
        for _ in range(12):
            policy.reset()
            for _ in range(16):
                policy.act(miniature.observation(random))
    miniature.write(folder / "int8.bundle", precision="int8", calibration=seen)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

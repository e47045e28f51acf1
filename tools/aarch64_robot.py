"""Prove bundles on this machine's processor and act: the robot's side alone.

python tools/aarch64_robot.py BUNDLE...
"""

import platform
import sys
from pathlib import Path

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.backends.onnxruntime import import_onnxruntime
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.proof import prove


def check(path: Path) -> str:
    """The proof's figures, after acting as a robot does."""
    bundle = Bundle.open(path)
    cases = ReferenceCases.of(bundle)
    with EdgePolicy.load(path, "onnxruntime") as policy:
        for case in cases.cases:
            policy.reset()
            for observation in cases.observations(case, bundle.manifest):
                policy.act(observation)
    return f"{path.name}: {prove(bundle, create_backend('onnxruntime', bundle))}"


def main() -> None:
    """All bundles of the command line."""
    system = f"{platform.machine()}, Python {platform.python_version()}"
    sys.stdout.write(f"{system}, ONNX Runtime {import_onnxruntime().__version__}\n")
    for path in sys.argv[1:]:
        sys.stdout.write(check(Path(path)) + "\n")


if __name__ == "__main__":
    main()

"""An environment with ROS 2 from wheels."""

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import environments
from environments import ROOT, find_python, impossible

REQUIREMENTS = ROOT / "tests" / "ros2" / "requirements.txt"
NODE_TESTS = ROOT / "tests" / "ros2" / "node"


@dataclass(frozen=True)
class Ros:
    """A Python with rclpy, the messages and what the robot's side needs."""

    python: Path

    def environment(self, **also: str) -> dict[str, str]:
        """Of its processes: a network of their own, on this machine alone."""
        places = [ROOT, ROOT / "integrations" / "ros2", NODE_TESTS]
        # Processes that are tested at the same time may not hear each other.
        domain = {"ROS_DOMAIN_ID": str(1 + os.getpid() % 100), "ROS_LOCALHOST_ONLY": "1"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
        return kept | domain | {"PYTHONPATH": os.pathsep.join(map(str, places))} | also


def prepare(version: str | None = None, numpy: str | None = None) -> Ros:
    """The environment of a Python version, this one's if none is given.

    What hinders is the reason of a skip; in CI it fails.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        impossible(f"there are no wheels of rclpy for {sys.platform} {platform.machine()}")
    interpreter = sys.executable if version is None else find_python(version)
    if interpreter is None:
        impossible(f"there is no Python {version} here")
    install = ["-r", str(REQUIREMENTS)]
    # Another Python has other newest versions.
    install += [f"numpy{numpy}"] if numpy else ["-c", str(ROOT / "constraints.txt")]
    return Ros(environments.prepare("ros2", install, interpreter))

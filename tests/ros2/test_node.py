"""The node itself: what is in `node` runs in an environment with ROS, whose pytest this starts."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import environments
import pytest
from environments import ROOT, find_python, impossible
from torture import FULL

pytestmark = [pytest.mark.xdist_group("ros2"), pytest.mark.extended]
HERE = Path(__file__).parent
NODE_TESTS = HERE / "node"
FILES = sorted(path.name for path in NODE_TESTS.glob("test_*.py"))


@dataclass(frozen=True)
class Ros:
    """A Python with rclpy from wheels, the messages and what the robot's side needs."""

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
    # Another Python has other newest versions.
    chosen = [f"numpy{numpy}"] if numpy else ["-c", str(ROOT / "constraints.txt")]
    install = ["-r", str(HERE / "requirements.txt"), *chosen]
    return Ros(environments.prepare("ros2", install, interpreter))


@pytest.fixture(scope="module")
def ros() -> Ros:
    return prepare()


def run(ros: Ros, mini: Path, *tests: str) -> None:
    """The outcome of the inner tests."""
    command = [
        str(ros.python), "-m", "pytest", "-q", "-rs", "--noconftest", "-c", "/dev/null",
        "-p", "no:cacheprovider", "-p", "no:logging", "-p", "robots", "--rootdir", str(NODE_TESTS), "--tb=short",
        *(str(NODE_TESTS / test) for test in tests),
    ]  # fmt: skip
    environment = ros.environment(
        VQBET_EDGE_TEST_BUNDLE=str(mini),
        VQBET_EDGE_TORTURE="1" if FULL else "",
    )
    done = subprocess.run(
        command, env=environment, cwd=NODE_TESTS, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout, done.stdout
    assert "passed" in done.stdout, done.stdout


@pytest.mark.parametrize("test", FILES)
def test_node(ros: Ros, mini: Path, test: str) -> None:
    run(ros, mini, test)


@pytest.mark.skipif(not FULL, reason="two more environments; VQBET_EDGE_TORTURE=1 tries them")
@pytest.mark.parametrize(("version", "numpy"), [("3.10", "==1.26.4"), ("3.12", ">=2")])
def test_other_pythons(mini: Path, version: str, numpy: str) -> None:
    """Humble has Python 3.10 and NumPy 1, Jazzy 3.12."""
    run(prepare(version, numpy), mini, *FILES)


def test_the_package_is_installed_as_ament_expects(ros: Ros, tmp_path: Path) -> None:
    """By the command that colcon installs Python packages with."""
    source = shutil.copytree(ROOT / "integrations" / "ros2", tmp_path / "source")
    prefix = tmp_path / "install"
    done = subprocess.run(
        [
            ros.python, "setup.py", "-q", "install", "--prefix", prefix,
            "--single-version-externally-managed", "--record", tmp_path / "record",
        ],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in (
        "share/ament_index/resource_index/packages/vqbet_edge_ros",
        "share/vqbet_edge_ros/package.xml",
        "share/vqbet_edge_ros/launch/policy.launch.py",
        "share/vqbet_edge_ros/config/pusht.yaml",
    ):
        assert (prefix / name).is_file(), name
    script = prefix / "lib" / "vqbet_edge_ros" / "policy"
    done = subprocess.run(
        [ros.python, "-c", f"import runpy; runpy.run_path({str(script)!r})"],
        env=ros.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

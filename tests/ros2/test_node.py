"""The node itself: what is in `node` runs in an environment with ROS, whose pytest this starts."""

import shutil
import subprocess
from pathlib import Path

import pytest
from ros_environment import NODE_TESTS, ROOT, Ros, prepare
from torture import FULL

pytestmark = [pytest.mark.xdist_group("ros2"), pytest.mark.extended]


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


@pytest.mark.parametrize("test", sorted(path.name for path in NODE_TESTS.glob("test_*.py")))
def test_node(ros: Ros, mini: Path, test: str) -> None:
    run(ros, mini, test)


@pytest.mark.skipif(not FULL, reason="two more environments; VQBET_EDGE_TORTURE=1 tries them")
@pytest.mark.parametrize(("version", "numpy"), [("3.10", "==1.26.4"), ("3.12", ">=2")])
def test_other_pythons(mini: Path, version: str, numpy: str) -> None:
    """Humble has Python 3.10 and NumPy 1, Jazzy 3.12."""
    tests = (path.name for path in NODE_TESTS.glob("test_*.py"))
    run(prepare(version, numpy), mini, *tests)


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

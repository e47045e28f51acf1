import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from vqbet_engines.boards import (
    board_names,
    jetpack_releases,
    load_board,
    match_board,
    match_jetpack,
)

from vqbet_edge.errors import UsageError


@pytest.mark.parametrize("name", [name for name in board_names() if name != "x86-gpu"])
def test_the_builder_gets_a_sixteenth_of_the_memory(name: str) -> None:
    board = load_board(name)
    assert board.workspace_mb == board.memory_gb * 1024 / 16


@pytest.mark.parametrize(
    ("model", "memory", "name"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit", 7.8, "orin-nano"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7.8,
         "orin-nano-super"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 3.9, "orin-nano-4gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 16.2, "orin-nx"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7.8, "orin-nx-8gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 32.9, "agx-orin-32gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 64.3, "agx-orin"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 131.0, "agx-thor"),
        ("Raspberry Pi 5 Model B", 8.2, None),
    ],
)  # fmt: skip
def test_this_board_is_recognised(model: str, memory: float, name: str | None) -> None:
    assert match_board(model, memory) == name


@pytest.mark.parametrize(
    ("l4t", "version"),
    [("35.6.1", "5.1"), ("36.3.0", "6.0"), ("36.4.0", "6.1"), ("36.4.2", "6.1"), ("36.4.3", "6.2"),
     ("36.4.4", "6.2"), ("36.4.7", "6.2"), ("36.5.0", "6.2"), ("36.5.2", "6.2"), ("38.2.1", "7.0"),
     ("38.4.0", "7.1"), ("39.2.0", "7.2"), ("40.1.0", None), ("3.64.0", None)],
)  # fmt: skip
def test_jetson_linux_tells_jetpack(l4t: str, version: str | None) -> None:
    found = match_jetpack(l4t)
    assert (found and found.version) == version


def test_supported_releases() -> None:
    supported = {release.version for release in jetpack_releases() if release.supported}
    assert supported == {"6.1", "6.2", "7.0", "7.1", "7.2"}


def test_an_unknown_board() -> None:
    with pytest.raises(UsageError, match=r"unknown board '\.\./jetpack'; use one of agx-orin"):
        load_board("../jetpack")


def test_the_wheel_brings_the_profiles(tmp_path: Path) -> None:
    wheel_builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder
    root = Path(__file__).parents[2]
    (wheel,) = wheel_builder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # As installed: the package alone, without the repository around it.
    code = "from vqbet_engines.boards import board_names; print(*board_names())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.split() == list(board_names()), done.stderr

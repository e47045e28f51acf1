import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from vqbet_engines.boards import (
    Board,
    board_names,
    jetpack_releases,
    load_board,
    match_board,
    match_jetpack,
)

from vqbet_edge.errors import UsageError

# Advertised figures, typed in a second time, apart from the profiles.
ADVERTISED = {  # memory GB, bandwidth GB/s, TOPS, DLA cores
    "orin-nano-4gb": (4, 34, 20, 0),
    "orin-nano": (8, 68, 40, 0),
    "orin-nano-super": (8, 102, 67, 0),
    "orin-nx-8gb": (8, 102, 70, 1),
    "orin-nx": (16, 102, 100, 2),
    "agx-orin-32gb": (32, 205, 200, 2),
    "agx-orin": (64, 205, 275, 2),
    "agx-thor": (128, 273, 2070, 0),
    "t4000": (64, 273, 1200, 0),
}
DESCRIPTIVE = {"name", "model", "super_mode", "tops_kind", "sources"}


@pytest.mark.parametrize("name", board_names())
def test_every_figure_has_a_source(name: str) -> None:
    board = load_board(name)
    assert set(board.sources) == set(Board.__struct_fields__) - DESCRIPTIVE
    assert all(board.sources.values())


@pytest.mark.parametrize("name", ADVERTISED)
def test_figures(name: str) -> None:
    board = load_board(name)
    figures = board.memory_gb, board.bandwidth_gb_s, board.tops, board.dla_cores
    assert figures == ADVERTISED[name]
    assert board.compute_capability == ("11.0" if board.tops_kind == "FP4 sparse" else "8.7")
    assert set(board.jetpack) <= {release.version for release in jetpack_releases()}


@pytest.mark.parametrize("name", [n for n in ADVERTISED if load_board(n).dla_cores == 0])
def test_the_rooflines_agree_with_the_advertised_operations(name: str) -> None:
    """Without accelerators the GPU does them all; sparse INT8 is 4, sparse FP4 8 dense FP16."""
    board = load_board(name)
    per_fp16 = 8 if board.tops_kind == "FP4 sparse" else 4
    assert board.fp16_tflops * per_fp16 == pytest.approx(board.tops, rel=0.03)


def test_the_transformers_weights_on_an_orin_nano() -> None:
    """25.6 million FP16 weights at 68 GB/s take three quarters of a millisecond."""
    assert load_board("orin-nano").memory_bound_ms(51_200_000) == pytest.approx(0.75, rel=0.01)


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


def test_boards_run_supported_releases_only() -> None:
    supported = {release.version for release in jetpack_releases() if release.supported}
    assert supported == {"6.1", "6.2", "7.0", "7.1", "7.2"}
    assert {version for name in board_names() for version in load_board(name).jetpack} == supported


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

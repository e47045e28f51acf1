import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vqbet_engines import boards
from vqbet_engines.boards import load_board, match_board, match_jetpack, profiles

from vqbet_edge.errors import UsageError


@pytest.mark.parametrize(
    ("model", "memory", "name", "workspace"),
    [
        ("Orin Nano Developer Kit", 7.8, "orin-nano", 512),
        ("Orin Nano Engineering Reference Developer Kit Super", 7.8, "orin-nano-super", 512),
        ("Orin Nano Developer Kit", 3.9, "orin-nano-4gb", 256),
        ("Orin NX Engineering Reference Developer Kit", 16.2, "orin-nx", 1024),
        ("Orin NX Engineering Reference Developer Kit", 7.8, "orin-nx-8gb", 512),
        ("AGX Orin Developer Kit", 32.9, "agx-orin-32gb", 2048),
        ("AGX Orin Developer Kit", 64.3, "agx-orin", 4096),
        ("AGX Thor Developer Kit", 131.0, "agx-thor", 8192),
    ],
)
def test_this_board_is_recognised(model: str, memory: float, name: str, workspace: int) -> None:
    assert match_board(f"NVIDIA Jetson {model}", memory) == name
    assert load_board(name).workspace_mb == workspace


def test_an_unknown_board() -> None:
    assert match_board("Raspberry Pi 5 Model B", 8.2) is None
    with pytest.raises(UsageError, match=r"unknown board '\.\./jetpack'; use one of agx-orin"):
        load_board("../jetpack")


@pytest.mark.parametrize(
    ("l4t", "version"),
    [("35.6.1", "5.1"), ("36.3.0", "6.0"), ("36.4.0", "6.1"), ("36.4.2", "6.1"), ("36.4.3", "6.2"),
     ("36.4.7", "6.2"), ("36.5.2", "6.2"), ("38.2.1", "7.0"), ("38.4.0", "7.1"), ("39.2.0", "7.2"),
     ("40.1.0", None), ("3.64.0", None)],
)  # fmt: skip
def test_jetson_linux_tells_jetpack(l4t: str, version: str | None) -> None:
    found = match_jetpack(l4t)
    assert (found and found.version) == version


def test_supported_releases() -> None:
    supported = {release.version for release in profiles().jetpack if release.supported}
    assert supported == {"6.1", "6.2", "7.0", "7.1", "7.2"}


def test_an_installed_package_has_the_profiles_inside(tmp_path: Path) -> None:
    """What is in the wheel, `test_surface` knows."""
    package = tmp_path / "vqbet_engines"
    shutil.copytree(Path(boards.__file__).parent, package)
    shutil.copy(Path(boards.__file__).parents[1] / "boards.toml", package)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from vqbet_engines.boards import __file__, profiles; print(__file__, len(profiles().board))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(package / "boards.py"), str(len(profiles().board))]

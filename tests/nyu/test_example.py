import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from vqbet_export.config import ExportConfig
from vqbet_export.exporter import export
from workshop import once

from examples import robot_utility_models

DATA = Path(__file__).parent / "data"


def exported(shared: Path, name: str) -> str:
    bundle = shared / f"{name}.bundle"
    once(
        bundle,
        lambda: export(ExportConfig(str(DATA / f"{name}.pt"), bundle, verify_steps=32, fps=4)),
    )
    return str(bundle)


def test_the_example_acts_as_their_controller_was_saved_to(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = load_file(DATA / "rum.safetensors")
    for number, grid in enumerate(golden["grids"]):
        # Squares as large as JPEG's blocks: nearly nothing is lost.
        picture = Image.fromarray(grid.repeat(8, 0).repeat(8, 1))
        picture.save(tmp_path / f"{number}.jpg", quality=100, subsampling=0)
    np.save(tmp_path / "action_list.npy", golden["actions"].ravel())
    robot_utility_models.main(exported(shared, "rum"), str(tmp_path))
    *steps, last = capsys.readouterr().out.splitlines()
    assert len(steps) == len(golden["actions"])
    assert max(json.loads(last.partition(": ")[2])) < 0.03  # 0.7 with red for blue


def test_the_example_drives_both_with_a_synthetic_camera(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robot_utility_models.main(exported(shared, "cap"))
    assert len(capsys.readouterr().out.splitlines()) == robot_utility_models.STEPS

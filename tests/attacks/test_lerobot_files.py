"""The files of a bundle that LeRobot's loader reads are made by its manifest, and by nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from attacks.manifests import reseal

from vqbet_edge import BundleError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.lerobot_files import LEROBOT_NAMES

FORMAT_2 = Path(__file__).parents[1] / "data" / "format2" / "bundle"


@pytest.fixture(params=["this format", "format 2"])
def bundle(request: pytest.FixtureRequest, mini: Path, tmp_path: Path) -> Path:
    source = mini if request.param == "this format" else FORMAT_2
    return Path(shutil.copytree(source, tmp_path / "a.bundle"))


@pytest.mark.parametrize("name", LEROBOT_NAMES)
def test_other_bytes_under_digests_that_fit(bundle: Path, name: str) -> None:
    """Another value, another spelling of the same value, another key: also that of a checkpoint."""
    original = (bundle / name).read_bytes()
    content = json.loads(original)
    evil = {"class": "subprocess.Popen", "config": {"args": ["true"]}}
    for changed in (
        {**content, "steps": [evil]},
        {**content, "type": "vqbet"},
        {**content, "license": "mit\x1b[2J"},
        {**content, "guards": {"action_limits": None}},
        content,
    ):
        reseal(bundle, {name: json.dumps(changed).encode()})
        with pytest.raises(BundleError, match=f"{name} is not what its manifest makes it"):
            Bundle.open(bundle)
    for text in (b"", b"[" * 100_000, b"\xff", original + b"\n"):
        reseal(bundle, {name: text})
        with pytest.raises(BundleError, match=f"{name} is not what its manifest makes it"):
            Bundle.open(bundle)
    reseal(bundle, {name: original})
    Bundle.open(bundle)

"""Nothing is ever unpickled: a pickle in any place where a file is read is refused.

`conftest.py` fails every test of the suite in which `pickle.find_class` fires.
"""

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from attacks.manifests import reseal
from attacks.saving import checkpoints, network, progress
from workshop import Workshop

from vqbet_edge import EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.manifest import MANIFEST_NAME
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.frames import kept_frames

PUSHT = Path(__file__).parents[1] / "data" / "pusht"


class Poison:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.mkdir, (self._marker,)


def _pickle(poison: Poison) -> bytes:
    return pickle.dumps(poison)


def _pt(poison: Poison) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": poison}, buffer)
    return buffer.getvalue()


def _npy(poison: Poison) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([poison], dtype=object))
    return buffer.getvalue()


# An .npz is a zip as .pt is.
KINDS: dict[str, Callable[[Poison], bytes]] = {"pickle": _pickle, "pt": _pt, "npy": _npy}


@pytest.fixture(params=KINDS)
def poison(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A poisoned file's bytes; nothing may have come of them when the test ends."""
    marker = tmp_path / "pwned"
    yield KINDS[request.param](Poison(marker))
    assert not marker.exists()


def test_in_a_bundle_with_digests_that_fit(mini: Path, tmp_path: Path, poison: bytes) -> None:
    bundle = Path(shutil.copytree(mini, tmp_path / "a.bundle"))
    for name in ("gpt_cached.onnx", "vision_encoder.onnx", "runtime.safetensors"):
        original = (bundle / name).read_bytes()
        reseal(bundle, {name: poison})
        with pytest.raises(VQBeTEdgeError):
            EdgePolicy.load(bundle, backend="onnxruntime")
        reseal(bundle, {name: original})
    (bundle / MANIFEST_NAME).write_bytes(poison)
    with pytest.raises(VQBeTEdgeError):
        EdgePolicy.load(bundle, backend="onnxruntime")


@pytest.fixture(scope="module")
def checkpoint(workshop: Workshop) -> Path:
    return workshop.checkpoint(oracle.TINY)


def test_in_every_file_of_a_checkpoint(checkpoint: Path, tmp_path: Path, poison: bytes) -> None:
    read = [path.name for path in checkpoint.iterdir() if path.suffix in {".json", ".safetensors"}]
    assert len(read) >= 6
    for name in read:
        copy = Path(shutil.copytree(checkpoint, tmp_path / name))
        (copy / name).write_bytes(poison)
        with pytest.raises(VQBeTEdgeError):
            load_checkpoint(str(copy))


@pytest.mark.parametrize("suffix", ["pkl", "pt", "bin", "npz", "npy"])
def test_as_a_checkpoint_or_a_policy(tmp_path: Path, poison: bytes, suffix: str) -> None:
    path = tmp_path / f"policy.{suffix}"
    path.write_bytes(poison)
    for load in (load_checkpoint, load_backend, EdgePolicy.load):
        with pytest.raises(VQBeTEdgeError):
            load(str(path))


def test_in_a_data_set(tmp_path: Path, poison: bytes) -> None:
    names = [
        str(p.relative_to(PUSHT)) for p in PUSHT.rglob("*") if p.suffix != ".md" and p.is_file()
    ]
    for number, name in enumerate(n for n in names if not n.startswith("LICENSE")):
        copy = Path(shutil.copytree(PUSHT, tmp_path / str(number)))
        (copy / name).write_bytes(poison)
        try:
            dataset = LeRobotDataset.open(copy)
            dataset.episode(0)
            dataset.statistics("observation.image")
        except VQBeTEdgeError:
            continue
        assert name == "meta/tasks.parquet"  # not read


def test_in_the_cache_of_frames(tmp_path: Path, poison: bytes) -> None:
    path = tmp_path / "frames.npy"
    path.write_bytes(poison)
    with pytest.raises(VQBeTEdgeError, match="is not the cache that was written"):
        kept_frames(lambda _: [], (1, 2, 2, 3), path)


def test_in_a_training_state(tmp_path: Path, poison: bytes) -> None:
    whole = tmp_path / "whole"
    checkpoints(whole).save(progress(3), network(), None, {"state": {}, "param_groups": []})
    folder = whole / "checkpoints" / "last"
    assert checkpoints(whole, resume=True).start() is not None
    names = {"model.safetensors", "train_config.json", "optimizer.safetensors"}
    paths = [path for path in folder.rglob("*") if path.name in names]
    assert {path.name for path in paths} == names
    for path in paths:
        copy = Path(shutil.copytree(whole, tmp_path / path.name, symlinks=True))
        (copy / "checkpoints" / "last" / path.relative_to(folder)).write_bytes(poison)
        with pytest.raises(VQBeTEdgeError):
            checkpoints(copy, resume=True).start()


def test_the_suite_would_notice(unpickled: list[str]) -> None:
    pickle.loads(pickle.dumps(Path))  # noqa: S301 - a harmless one
    assert unpickled
    unpickled.clear()

"""Nothing is ever unpickled: a pickle in any place where a file is read is refused.

`conftest.py` fails every test of the suite in which `pickle.find_class` fires.
"""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import oracle
import pytest
import torch
from vqbet_export.publishing import file_specs
from workshop import Workshop

from vqbet_edge import EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.manifest import MANIFEST_NAME, encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.frames import cached_frames

PUSHT = Path(__file__).parents[1] / "data" / "pusht"


class Poison:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.mkdir, (self._marker,)


def _pickle(marker: Path) -> bytes:
    return pickle.dumps(Poison(marker))


def _pt(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Poison(marker)}, buffer)
    return buffer.getvalue()


def _npz(marker: Path) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, frames=np.array([Poison(marker)], dtype=object))
    return buffer.getvalue()


def _npy(marker: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Poison(marker)], dtype=object))
    return buffer.getvalue()


KINDS: dict[str, Callable[[Path], bytes]] = {"pickle": _pickle, "pt": _pt, "npz": _npz, "npy": _npy}


@pytest.fixture(params=KINDS)
def poison(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A poisoned file's bytes; nothing may have come of them when the test ends."""
    marker = tmp_path / "pwned"
    yield KINDS[request.param](marker)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "gpt_cached.onnx",
        "code_heads.onnx",
        "vision_encoder.onnx",
        "runtime.safetensors",
        MANIFEST_NAME,
    ],
)
def test_in_a_bundle_with_digests_that_fit(
    mini: Path, tmp_path: Path, poison: bytes, name: str
) -> None:
    bundle = Path(shutil.copytree(mini, tmp_path / "a.bundle"))
    manifest = decode_manifest((bundle / MANIFEST_NAME).read_bytes())
    contents = {each: (bundle / each).read_bytes() for each in manifest.files} | {name: poison}
    contents.pop(MANIFEST_NAME, None)
    sealed = msgspec.structs.replace(manifest, files=file_specs(contents))
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(sealed))
    (bundle / name).write_bytes(poison)
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


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "pth", "bin", "ckpt", "npz", "npy"])
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
        cached_frames([], (1, 2, 2, 3), path)


def test_in_a_training_state(tmp_path: Path, poison: bytes) -> None:
    from attacks.saving import checkpoints, network, progress

    whole = tmp_path / "whole"
    checkpoints(whole).save(progress(3), network(), None, {"state": {}, "param_groups": []})
    folder = whole / "checkpoints" / "last"
    assert checkpoints(whole, resume=True).start() is not None
    tried = set()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        read = name.startswith("training_state") or path.name in {
            "model.safetensors",
            "train_config.json",
        }
        if not read or path.is_dir():
            continue
        tried.add(path.name)
        copy = Path(shutil.copytree(whole, tmp_path / path.name, symlinks=True))
        (copy / "checkpoints" / "last" / name).write_bytes(poison)
        with pytest.raises(VQBeTEdgeError):
            checkpoints(copy, resume=True).start()
    assert {"model.safetensors", "train_config.json", "optimizer.safetensors"} <= tried


def test_the_suite_would_notice(tmp_path: Path, unpickled: list[str]) -> None:
    pickle.loads(pickle.dumps(Path))  # noqa: S301 - a harmless one
    assert unpickled
    unpickled.clear()
    assert not (tmp_path / "pwned").exists()
    assert json.loads("[]") == []

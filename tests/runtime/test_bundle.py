"""Bundles: what is checked before anything is parsed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from attacks.manifests import reseal, spelled

from vqbet_edge import BackendError, BundleError, DiskError, EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.bundle import RUNTIME_NAME, Bundle
from vqbet_edge.runtime.manifest import MANIFEST_NAME, Manifest, encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest


@pytest.fixture
def bundle(mini: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini, tmp_path / "copy.bundle"))


def test_manifest_names_every_file_and_survives_a_round_trip(bundle: Path) -> None:
    data = (bundle / MANIFEST_NAME).read_bytes()
    decoded = decode_manifest(data)
    assert encode_manifest(decoded) == data
    assert {path.name for path in bundle.iterdir()} == {MANIFEST_NAME, *decoded.files}
    assert decoded.source.layout == "0.4+"
    assert decoded.verification is not None
    assert decoded.verification.code_agreement == 1


@pytest.mark.parametrize("name", ["gpt.onnx", "report.md"])
def test_changed_truncated_grown_and_missing_files_are_refused(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for wrong in (flipped, data[:-1], data + b"\0"):
        (bundle / name).write_bytes(wrong)
        with pytest.raises(BundleError, match=f"'{name}' is not the file that was exported"):
            EdgePolicy.load(bundle)
    (bundle / name).unlink()
    with pytest.raises(DiskError, match="No such file"):
        EdgePolicy.load(bundle)


def test_a_size_in_the_manifest_reserves_no_memory(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest["files"]["gpt.onnx"]["size"] = 1 << 32
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(msgspec.convert(manifest, Manifest)))
    with pytest.raises(BundleError, match=r"'gpt.onnx' is not the file that was exported"):
        Bundle.open(bundle)


def test_something_else_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="make one with: vqbet-export"):
        EdgePolicy.load(tmp_path)
    # Longer than the file system takes.
    with pytest.raises(BundleError, match="is not a bundle"):
        EdgePolicy.load("a" * 5000)


def policy(**changes: Any) -> Callable[[dict], object]:
    return lambda manifest: manifest["policy"].update(changes)


# Under a digest that fits: what the types cannot say, and what only the graphs contradict.
EDITED: dict[str, tuple[Callable[[dict], object], str]] = {
    "other format": (
        lambda m: m.update(format_version=1),
        "format 1, expected 3 or 2; .*vqbet-export .* --force",
    ),
    "unknown field": (lambda m: m.update(extra=1), "not a manifest of its format"),
    "missing stage": (lambda m: m["stages"].pop("gpt"), "lacks the stages"),
    "missing digest": (lambda m: m["files"].pop("gpt.onnx"), "names no digest for"),
    "unverified": (lambda m: m.update(verification=None), "never verified"),
    "no camera": (lambda m: m["input_features"].pop("observation.image"), "expected cameras"),
    "grey camera": (
        lambda m: m["input_features"]["observation.image"].update(shape=[1, 24, 24]),
        "expected cameras",
    ),
    "no state": (
        lambda m: m["input_features"].pop("observation.state"),
        r"expected \[1\] tokens_per_step",
    ),
    "no action": (lambda m: m["output_features"].clear(), "neither, and one 'action'"),
    "a goal besides the state": (
        lambda m: m["input_features"].update(goal={"type": "ENV", "shape": [2]}),
        "the policy observes",
    ),
    "action kinds": (policy(action_kinds=["angle"]), "expected action_kinds for 2"),
    "tokens": (policy(tokens_per_step=4), r"expected \[1, 3\] tokens_per_step"),
    "heads that do not divide": (policy(gpt_n_head=7), "no multiple of gpt_n_head"),
    "crop outside": (lambda m: m["crop"].update(top=10), "leaves the image"),
    "gigantic tokens": (policy(gpt_hidden_dim=1 << 30), "more than any robot's"),
    "gigantic file": (
        lambda m: m["files"]["gpt.onnx"].update(size=1 << 40),
        "not a manifest of its format",
    ),
    "window longer than the graph's": (policy(n_obs_steps=6), "config.json is not what"),
    "window shorter than the graph's": (policy(n_obs_steps=1), "config.json is not what"),
    "other code book": (policy(vqvae_n_embed=4), "failed in code_heads"),
    "other width": (policy(gpt_hidden_dim=128), "lacks the array 'token_constants'"),
    "other number of blocks": (policy(gpt_n_layer=3), "failed in gpt"),
    "other number of heads": (policy(gpt_n_head=4), "failed in gpt"),
    "other chunk": (policy(action_chunk_size=4), "failed in code_heads"),
    "other crop": (lambda m: m["crop"].update(height=10), "failed in vision_encoder"),
}


@pytest.mark.parametrize("name", EDITED)
def test_manifests_that_are_refused(bundle: Path, name: str) -> None:
    change, message = EDITED[name]
    manifest = json.loads((bundle / MANIFEST_NAME).read_bytes())
    change(manifest)
    (bundle / MANIFEST_NAME).write_bytes(spelled(manifest))
    with pytest.raises((BundleError, BackendError), match=message):
        EdgePolicy.load(bundle)


def test_files_that_are_refused_under_digests_that_fit(bundle: Path) -> None:
    """Garbage, ONNX Runtime's own format, and graphs in each other's place."""
    heads = (bundle / "code_heads.onnx").read_bytes()
    for name, data, message in (
        ("gpt.onnx", b"\x20\0\0\0ORTM" + bytes(64), "gpt.onnx has ONNX Runtime's own format"),
        ("gpt_cached.onnx", b"not a graph", "ONNX Runtime refuses gpt.onnx"),
        ("gpt_cached.onnx", heads, "ONNX Runtime refuses gpt"),
    ):
        original = (bundle / name).read_bytes()
        reseal(bundle, {name: data})
        with pytest.raises(VQBeTEdgeError, match=message):
            EdgePolicy.load(bundle, "onnxruntime")
        reseal(bundle, {name: original})


def tensors(*shapes: list[int], dtype: str = "F32", body: bytes = b"1234") -> bytes:
    """A safetensors file whose arrays all lie over its first four bytes."""
    header = {
        str(i): {"dtype": dtype, "shape": shape, "data_offsets": [0, len(body)]}
        for i, shape in enumerate(shapes)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ARRAYS: dict[str, bytes] = {
    "empty": b"",
    "header longer than the file": (1 << 40).to_bytes(8, "little"),
    "other type": tensors([1], dtype="F64", body=b"12345678"),
    "shape and bytes differ": tensors([2]),
    "left over": tensors([1], body=b"12345"),
    "overlap": tensors([1], [1]),
    "impossible shape": tensors([0, 1 << 40, 1 << 40], body=b""),
    "a product that takes 20 seconds": tensors([9] * 400_000),
    "negative": tensors([-1]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_array_files_that_are_refused(bundle: Path, name: str) -> None:
    reseal(bundle, {RUNTIME_NAME: ARRAYS[name]})
    with pytest.raises(BundleError, match=r"runtime\.safetensors|lacks the array"):
        EdgePolicy.load(bundle)

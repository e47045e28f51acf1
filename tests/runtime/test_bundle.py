"""Bundles: what is checked before anything is parsed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from attacks.manifests import sealed, spelled
from vqbet_export.publishing import file_specs
from workshop import Exported

from vqbet_edge import BackendError, BundleError, DiskError, EdgePolicy
from vqbet_edge.errors import VQBeTEdgeError
from vqbet_edge.runtime.bundle import RUNTIME_NAME, Bundle
from vqbet_edge.runtime.manifest import MANIFEST_NAME, Manifest, encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest


@pytest.fixture
def bundle(tiny: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.bundle, tmp_path / "copy.bundle"))


@pytest.fixture(scope="module")
def manifest(tiny: Exported) -> bytes:
    return (tiny.bundle / MANIFEST_NAME).read_bytes()


def reseal(bundle: Path, change: Callable[[dict[str, bytes]], object]) -> None:
    """Change files and write the digests that belong to them, as an attacker would."""
    manifest = decode_manifest((bundle / MANIFEST_NAME).read_bytes())
    contents = {name: (bundle / name).read_bytes() for name in manifest.files}
    change(contents)
    for name, data in contents.items():
        (bundle / name).write_bytes(data)
    sealed = msgspec.structs.replace(manifest, files=file_specs(contents))
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(sealed))


def test_manifest_names_every_file_and_survives_a_round_trip(bundle: Path, manifest: bytes) -> None:
    decoded = decode_manifest(manifest)
    assert encode_manifest(decoded) == manifest
    names = {path.name for path in bundle.iterdir()}
    assert names == {MANIFEST_NAME, *decoded.files}
    assert decoded.source.layout == "0.4+"
    assert decoded.verification is not None
    assert decoded.verification.code_agreement == 1


@pytest.mark.parametrize("name", ["gpt.onnx", "runtime.safetensors", "report.md", "report.json"])
def test_a_flipped_byte_is_found_and_the_file_named(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"'{name}' is not the file that was exported"):
        EdgePolicy.load(bundle)


@pytest.mark.parametrize("name", ["gpt.onnx", "report.md"])
def test_truncated_grown_and_missing_files_are_refused(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    for wrong in (data[:-1], data + b"\0"):
        (bundle / name).write_bytes(wrong)
        with pytest.raises(BundleError, match="not the file that was exported"):
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


def test_links_are_not_followed(bundle: Path) -> None:
    moved = bundle.parent / "elsewhere.onnx"
    (bundle / "gpt.onnx").rename(moved)
    (bundle / "gpt.onnx").symlink_to(moved)
    with pytest.raises(BundleError, match="is a link"):
        EdgePolicy.load(bundle)


def test_something_else_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="make one with: vqbet-export"):
        EdgePolicy.load(tmp_path)


def edited(manifest: bytes, change: Callable[[dict], object]) -> bytes:
    value = json.loads(manifest)
    change(value)
    return spelled(value)


MANIFESTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "no object": lambda _: b"[]\n",
    "byte order mark": lambda m: b"\xef\xbb\xbf" + m,
    "white space": lambda m: m + b" ",
    "key twice": lambda m: m.replace(b'"n_obs_steps": 5,', b'"n_obs_steps": 4, "n_obs_steps": 5,'),
    "other spelling of a number": lambda m: m.replace(b'"n_obs_steps": 5', b'"n_obs_steps": 5.0'),
    "NaN": lambda m: m.replace(b'"n_obs_steps": 5', b'"n_obs_steps": NaN'),
    "huge": lambda m: m + b" " * (1 << 20),
    "deep": lambda _: b"[" * 100_000,
    "unknown field": lambda m: edited(m, lambda v: v.update(extra=1)),
    "other format": lambda m: edited(m, lambda v: v.update(format_version=4)),
    "missing stage": lambda m: edited(m, lambda v: v["stages"].pop("gpt")),
    "missing digest": lambda m: edited(m, lambda v: v["files"].pop("gpt.onnx")),
    "unverified": lambda m: edited(m, lambda v: v.update(verification=None)),
    "no camera": lambda m: edited(m, lambda v: v["input_features"].pop("observation.image")),
    "no state": lambda m: edited(m, lambda v: v["input_features"].pop("observation.state")),
    "no action": lambda m: edited(m, lambda v: v["output_features"].clear()),
    "not UTF-8": lambda m: m.replace(b"lerobot", b"lero\xffot").replace(b"tiny", b"t\xe9ny"),
    "grey camera": lambda m: edited(
        m, lambda v: v["input_features"]["observation.image"].update(shape=[1, 40, 48])
    ),
    "window longer than the graph's": lambda m: edited(
        m, lambda v: v["policy"].update(n_obs_steps=6)
    ),
    "window shorter than the graph's": lambda m: edited(
        m, lambda v: v["policy"].update(n_obs_steps=1)
    ),
    "other code book": lambda m: edited(m, lambda v: v["policy"].update(vqvae_n_embed=8)),
    "other width": lambda m: edited(m, lambda v: v["policy"].update(gpt_hidden_dim=128)),
    "other feature width": lambda m: edited(m, lambda v: v["policy"].update(gpt_output_dim=96)),
    "other number of blocks": lambda m: edited(m, lambda v: v["policy"].update(gpt_n_layer=3)),
    "other number of heads": lambda m: edited(m, lambda v: v["policy"].update(gpt_n_head=2)),
    "heads that do not divide": lambda m: edited(m, lambda v: v["policy"].update(gpt_n_head=7)),
    "other chunk": lambda m: edited(m, lambda v: v["policy"].update(action_chunk_size=4)),
    "other crop": lambda m: edited(m, lambda v: v["crop"].update(height=30)),
    "a field of format 1": lambda m: edited(m, lambda v: v.update(batch_size=1)),
    "gigantic tokens": lambda m: edited(m, lambda v: v["policy"].update(gpt_hidden_dim=1 << 30)),
    "gigantic camera": lambda m: edited(
        m, lambda v: v["input_features"]["observation.image"].update(shape=[3, 1 << 20, 1 << 20])
    ),
    "gigantic file": lambda m: edited(m, lambda v: v["files"]["gpt.onnx"].update(size=1 << 40)),
    "crop outside": lambda m: edited(m, lambda v: v["crop"].update(top=10)),
    "parent directory": lambda m: m.replace(b'"gpt.onnx"', b'"../gpt.onnx"'),
    "absolute path": lambda m: m.replace(b'"gpt.onnx"', b'"/etc/passwd"'),
    "upper case": lambda m: m.replace(b'"gpt.onnx"', b'"GPT.onnx"'),
    "terminal's escape sequence": lambda m: edited(
        m, lambda v: v["source"].update(name="\x1b]0;pwned\x07")
    ),
    "trailing newline in a name": lambda m: m.replace(b'"gpt.onnx"', b'"gpt.onnx\\n"'),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_are_refused(bundle: Path, manifest: bytes, name: str) -> None:
    """Under a digest that fits, too: what the manifest cannot contradict, the graphs do."""
    changed = MANIFESTS[name](manifest)
    assert changed != manifest
    for text in {changed, sealed(changed)}:
        (bundle / MANIFEST_NAME).write_bytes(text)
        with pytest.raises((BundleError, BackendError)):
            EdgePolicy.load(bundle)


def test_a_bundle_of_the_first_format_is_to_be_exported_again(
    bundle: Path, manifest: bytes
) -> None:
    (bundle / MANIFEST_NAME).write_bytes(edited(manifest, lambda v: v.update(format_version=1)))
    with pytest.raises(BundleError, match=r"format 1, expected 3 or 2; .*vqbet-export .* --force"):
        EdgePolicy.load(bundle)


def external(contents: dict[str, bytes]) -> None:
    model = onnx.load_from_string(contents["gpt.onnx"])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret.bin")
    contents["gpt.onnx"] = model.SerializeToString()


def test_external_data_is_refused_even_under_valid_digests(bundle: Path) -> None:
    reseal(bundle, external)
    with pytest.raises(
        BundleError, match=r"gpt.onnx refers to external data, which is never loaded"
    ):
        EdgePolicy.load(bundle)


def test_onnx_runtimes_own_format_is_refused(bundle: Path) -> None:
    reseal(bundle, lambda c: c.update({"gpt.onnx": b"\x20\0\0\0ORTM" + bytes(64)}))
    with pytest.raises(BundleError, match=r"gpt.onnx has ONNX Runtime's own format"):
        EdgePolicy.load(bundle)


def test_a_name_longer_than_the_file_system_takes_is_no_bundle() -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        EdgePolicy.load("a" * 5000)


def test_garbage_under_valid_digests_is_our_error(bundle: Path) -> None:
    reseal(bundle, lambda c: c.update({"gpt_cached.onnx": b"not a graph"}))
    with pytest.raises(VQBeTEdgeError, match=r"ONNX Runtime refuses gpt.onnx"):
        EdgePolicy.load(bundle)


def test_swapped_graphs_under_valid_digests_are_our_error(bundle: Path) -> None:
    def swap(contents: dict[str, bytes]) -> None:
        names = "gpt.onnx", "code_heads.onnx"
        contents.update(dict(zip(names, [contents[n] for n in reversed(names)], strict=True)))

    reseal(bundle, swap)
    with pytest.raises(VQBeTEdgeError):
        EdgePolicy.load(bundle)


def tensor_file(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ARRAYS: dict[str, bytes] = {
    "empty": b"",
    "header longer than the file": (1 << 40).to_bytes(8, "little"),
    "no JSON": tensor_file(b"{"),
    "other type": tensor_file({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"),
    "shape and bytes differ": tensor_file(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"
    ),
    "hole": tensor_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
    "past the end": tensor_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"12"),
    "left over": tensor_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"),
    "overlap": tensor_file(
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        b"1234",
    ),
    "not UTF-8": tensor_file(b'{"\xff": 1}'),
    "impossible shape": tensor_file(
        {"a": {"dtype": "F32", "shape": [0, 1 << 40, 1 << 40], "data_offsets": [0, 0]}}
    ),
    "a product that takes 20 seconds": tensor_file(
        {"a": {"dtype": "F32", "shape": [9] * 400_000, "data_offsets": [0, 4]}}, b"1234"
    ),
    "negative": tensor_file({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_array_files_that_are_refused(bundle: Path, name: str) -> None:
    reseal(bundle, lambda c: c.update({RUNTIME_NAME: ARRAYS[name]}))
    with pytest.raises(BundleError, match=r"runtime\.safetensors|lacks the array"):
        EdgePolicy.load(bundle)


def test_manifest_type_is_strict_all_the_way_down() -> None:
    assert msgspec.inspect.type_info(Manifest).forbid_unknown_fields  # type: ignore[attr-defined]

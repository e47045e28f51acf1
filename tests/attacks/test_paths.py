"""No path leaves the bundle: not the manifest's, not ONNX's; the interpreter itself is watched."""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import onnx
import pytest
from attacks.manifests import reseal
from hypothesis import given, strategies

from vqbet_edge import BundleError, EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.manifest import MANIFEST_NAME, FileName, encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest

SECRET = b"what the bundle must not read"
_OPENED: list[str] = []
_WATCHING = False


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _WATCHING and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        _OPENED.append(os.path.abspath(os.fsdecode(arguments[0])))  # noqa: PTH100 - links stay


@contextmanager
def watched() -> Iterator[list[str]]:
    """The paths that are opened meanwhile."""
    global _WATCHING  # noqa: PLW0603 - an audit hook can never be taken out again
    if not getattr(sys, "_vqbet_edge_watched", False):
        sys.addaudithook(_audit)
        sys._vqbet_edge_watched = True  # type: ignore[attr-defined]
    _OPENED.clear()
    _WATCHING = True
    try:
        yield _OPENED
    finally:
        _WATCHING = False


@pytest.fixture
def bundle(mini: Path, tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        (folder / "secret.bin").write_bytes(SECRET)
    return Path(shutil.copytree(mini, tmp_path / "b" / "a.bundle"))


def refused_within(bundle: Path) -> None:
    """Loading fails with our error, and opens nothing but the bundle's own files."""
    with watched() as opened, pytest.raises(VQBeTEdgeError):
        EdgePolicy.load(bundle, backend="onnxruntime")
    library = (sys.prefix, sys.base_prefix, "/proc", "/sys", str(Path(__file__).parents[2]))
    assert str(bundle / MANIFEST_NAME) in opened
    foreign = [p for p in opened if not p.startswith((str(bundle) + os.sep, *library))]
    assert foreign == []
    assert not any("secret" in path for path in opened)


# One of each kind; the pattern that manifests are checked against is tested by names drawn below.
NAMES = [
    "../secret.bin", "engines/../../secret.bin", "/etc/passwd", "engines/gpt.onnx", "..", "",
    ".secret.bin", "~/secret.bin", "..\\secret.bin", "a" * 5000 + ".onnx", "gpt.onnx\0.bin",
    "gpt.onnx\n", "gpt.onnx.", "GPT.onnx", "\uff47pt.onnx", "v\u0131sion_encoder.onnx",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_stage", [False, True], ids=["file", "stage"])
def test_names_in_the_manifest(bundle: Path, name: str, as_stage: bool) -> None:
    manifest = decode_manifest((bundle / MANIFEST_NAME).read_bytes())
    files, stages = dict(manifest.files), dict(manifest.stages)
    files[name] = files["gpt.onnx"]
    if as_stage:
        stages["gpt"] = msgspec.structs.replace(stages["gpt"], file=name)
    changed = msgspec.structs.replace(manifest, files=files, stages=stages)
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(changed))
    refused_within(bundle)


@given(strategies.text(max_size=80))
def test_a_file_name_is_one_component_of_plain_characters(name: str) -> None:
    try:
        accepted = msgspec.convert(name, FileName)
    except msgspec.ValidationError:
        return
    assert set(accepted) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.")
    assert accepted.count(".") == 1
    assert not accepted.startswith(".")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's name has a hundred bytes at the most.
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def _same_bytes_elsewhere(path: Path) -> None:
    elsewhere = path.parents[1] / "same.onnx"
    elsewhere.write_bytes(_ORIGINAL[path.name])
    path.symlink_to(elsewhere)


_ORIGINAL: dict[str, bytes] = {}
PLANTED: dict[str, Callable[[Path], object]] = {
    "relative link": lambda p: p.symlink_to("../secret.bin"),
    "link to the same bytes": _same_bytes_elsewhere,
    "link to a device": lambda p: p.symlink_to("/dev/zero"),
    "link to nothing": lambda p: p.symlink_to("nowhere"),
    "link to itself": lambda p: p.symlink_to(p.name),
    "hard link": lambda p: os.link(p.parents[1] / "secret.bin", p),
    "pipe": os.mkfifo,
    "socket": _socket,
    "folder": Path.mkdir,
    "device": lambda p: os.mknod(p, 0o020666, os.makedev(1, 5)),
}
# Links of each kind where every other file stands; the manifest itself is found first.
PLACES = [*((kind, "gpt.onnx") for kind in PLANTED), *(
    (kind, name)
    for kind in ("relative link", "link to the same bytes", "pipe", "folder")
    for name in ("runtime.safetensors", MANIFEST_NAME)
)]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_what_stands_where_a_file_should(bundle: Path, kind: str, name: str) -> None:
    path = bundle / name
    _ORIGINAL[name] = path.read_bytes()
    path.unlink()
    try:
        PLANTED[kind](path)
    except PermissionError:
        pytest.skip("only root makes devices")
    refused_within(bundle)


def test_a_hard_link_to_the_exported_bytes_is_that_file(bundle: Path) -> None:
    # Backups and image builders share equal files so; the digest says that they are equal.
    os.link(bundle / "gpt.onnx", bundle.parent / "backup.onnx")
    with watched() as opened:
        EdgePolicy.load(bundle, backend="onnxruntime")
    assert str(bundle.parent / "backup.onnx") not in opened


def _initializer(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.raw_data)


def _constant(model: onnx.ModelProto) -> onnx.TensorProto:
    node = model.graph.node.add(op_type="Constant", output=["planted"])
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(onnx.helper.make_tensor("planted", 1, [4], [0.0] * 4))
    return attribute.t


def _in_a_branch(model: onnx.ModelProto) -> onnx.TensorProto:
    node = model.graph.node.add(op_type="If", input=["condition"], output=["planted"])
    attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
    tensor: onnx.TensorProto = attribute.g.initializer.add(name="planted", data_type=1, dims=[4])
    return tensor


@pytest.mark.parametrize(
    ("place", "key"),
    [
        (_initializer, "Location"),
        *((p, "location") for p in (_initializer, _constant, _in_a_branch)),
    ],
)
def test_external_data(
    bundle: Path, place: Callable[[onnx.ModelProto], onnx.TensorProto], key: str
) -> None:
    """Wherever it is said to be; under another key it is nowhere, which the library refuses."""
    model = onnx.load_from_string((bundle / "code_heads.onnx").read_bytes())
    tensor = place(model)
    for field in ("raw_data", "float_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for name, value in ((key, "../secret.bin"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=name, value=value)
    reseal(bundle, {"code_heads.onnx": model.SerializeToString()})
    refused_within(bundle)


@pytest.mark.parametrize("location", ["weights.bin", "/dev/zero", "*/_ORT_MEM_ADDR_/*", ""])
def test_the_key_alone_is_refused(bundle: Path, location: str) -> None:
    # Protobuf has no escapes and no compression: what a parser would see as the key is the key.
    graph = (bundle / "code_heads.onnx").read_bytes()
    entry = onnx.StringStringEntryProto(key="location", value=location).SerializeToString()
    reseal(bundle, {"code_heads.onnx": graph + b"\x7a" + bytes([len(entry)]) + entry})
    with pytest.raises(BundleError, match="refers to external data, which is never loaded"):
        EdgePolicy.load(bundle)

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
from vqbet_export.publishing import file_specs

from vqbet_edge import BundleError, EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.manifest import MANIFEST_NAME, encode_manifest
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
    (tmp_path / "secret.bin").write_bytes(SECRET)
    (tmp_path / "b" / "secret.bin").parent.mkdir()
    (tmp_path / "b" / "secret.bin").write_bytes(SECRET)
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


NAMES = {
    "parent": "../secret.bin",
    "grandparent": "../../secret.bin",
    "parent behind a folder": "engines/../../secret.bin",
    "many parents": "../" * 40 + "etc/passwd",
    "absolute": "/etc/passwd",
    "absolute, two slashes": "//etc/passwd",
    "here": "./gpt.onnx",
    "folder": "engines/gpt.onnx",
    "the folder itself": ".",
    "parent itself": "..",
    "nothing": "",
    "hidden": ".secret.bin",
    "home": "~/secret.bin",
    "variable": "$HOME.bin",
    "backslashes": "..\\secret.bin",
    "drive": "c:secret.bin",
    "network share": "\\\\host\\secret.bin",
    "URL": "file:///etc/passwd",
    "percent-encoded": "%2e%2e%2fsecret.bin",
    "overlong": "a" * 5000 + ".onnx",
    "NUL": "gpt.onnx\0.bin",
    "new line": "gpt.onnx\n",
    "trailing slash": "gpt.onnx/",
    "trailing dot": "gpt.onnx.",
    "trailing space": "gpt.onnx ",
    "upper case": "GPT.onnx",
    "full-width letters": "\uff47pt.onnx",
    "dotless i": "v\u0131sion_encoder.onnx",
    "long s": "vi\u017fion_encoder.onnx",
    "right to left": "gpt\u202e.onnx",
    "alternate stream": "gpt.onnx:secret",
    "device": "/dev/stdin",
    "descriptor": "/proc/self/fd/0",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_stage", [False, True], ids=["file", "stage"])
def test_names_in_the_manifest(bundle: Path, name: str, as_stage: bool) -> None:
    manifest = decode_manifest((bundle / MANIFEST_NAME).read_bytes())
    bad, files = NAMES[name], dict(manifest.files)
    files[bad] = files["gpt.onnx"]
    stages = dict(manifest.stages)
    if as_stage:
        stages["gpt"] = msgspec.structs.replace(stages["gpt"], file=bad)
    changed = msgspec.structs.replace(manifest, files=files, stages=stages)
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(changed))
    refused_within(bundle)


def _outside(path: Path) -> Path:
    return path.parents[1] / "secret.bin"


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's name has a hundred bytes at the most.
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _through_a_linked_folder(path: Path) -> None:
    (path.parent / "engines").symlink_to(path.parents[1])
    path.symlink_to("engines/secret.bin")


def _same_bytes_elsewhere(path: Path) -> None:
    elsewhere = path.parents[1] / "same.onnx"
    elsewhere.write_bytes(_ORIGINAL[path.name])
    path.symlink_to(elsewhere)


_ORIGINAL: dict[str, bytes] = {}
PLANTED: dict[str, Callable[[Path], object]] = {
    "relative link": lambda p: p.symlink_to("../secret.bin"),
    "absolute link": lambda p: p.symlink_to(_outside(p)),
    "link to the same bytes": _same_bytes_elsewhere,
    "link to a link": lambda p: ((p.parent / "x").symlink_to(_outside(p)), p.symlink_to("x")),
    "link through a linked folder": _through_a_linked_folder,
    "link to a device": lambda p: p.symlink_to("/dev/zero"),
    "link to a descriptor": lambda p: p.symlink_to("/proc/self/fd/0"),
    "link to nothing": lambda p: p.symlink_to("nowhere"),
    "link to itself": _loop,
    "hard link": lambda p: os.link(_outside(p), p),
    "pipe": _fifo,
    "socket": _socket,
    "folder": lambda p: p.mkdir(),
    "device": lambda p: os.mknod(p, 0o020666, os.makedev(1, 5)),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", ["gpt.onnx", "runtime.safetensors", MANIFEST_NAME])
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


LOCATIONS = {
    "beside": "weights.bin",
    "parent": "../secret.bin",
    "grandparent": "../../secret.bin",
    "absolute": "/etc/passwd",
    "device": "/dev/zero",
    "descriptor": "/proc/self/fd/0",
    "its own memory": "*/_ORT_MEM_ADDR_/*",
    "URL": "file:///etc/passwd",
    "nothing": "",
    "backslashes": "..\\secret.bin",
    "link": "link.bin",
}


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


@pytest.mark.parametrize("place", [_initializer, _constant, _in_a_branch])
@pytest.mark.parametrize("location", LOCATIONS)
def test_external_data(
    bundle: Path, place: Callable[[onnx.ModelProto], onnx.TensorProto], location: str
) -> None:
    (bundle / "link.bin").symlink_to("../secret.bin")
    model = onnx.load_from_string((bundle / "code_heads.onnx").read_bytes())
    tensor = place(model)
    for field in ("raw_data", "float_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", LOCATIONS[location]), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    _reseal(bundle, model.SerializeToString())
    refused_within(bundle)


def test_external_data_without_a_location(bundle: Path) -> None:
    model = onnx.load_from_string((bundle / "code_heads.onnx").read_bytes())
    tensor = _initializer(model)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="Location", value="../secret.bin")
    _reseal(bundle, model.SerializeToString())
    refused_within(bundle)


def test_an_escaped_name_of_the_key_is_no_way_round(bundle: Path) -> None:
    # Protobuf has no escapes and no compression: what a parser would see as the key is the key.
    graph = (bundle / "code_heads.onnx").read_bytes()
    _reseal(bundle, graph + b"\x7a\x08location")
    with pytest.raises(BundleError, match="refers to external data"):
        EdgePolicy.load(bundle)


def _reseal(bundle: Path, graph: bytes) -> None:
    manifest = decode_manifest((bundle / MANIFEST_NAME).read_bytes())
    contents = {name: (bundle / name).read_bytes() for name in manifest.files}
    contents["code_heads.onnx"] = graph
    (bundle / "code_heads.onnx").write_bytes(graph)
    sealed = msgspec.structs.replace(manifest, files=file_specs(contents))
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(sealed))

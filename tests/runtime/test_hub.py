"""Bundles on the Hub: the real client against a stand-in of its HTTP interface on the loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub
import pytest

from vqbet_edge import BundleError, EdgePolicy, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.hub import is_hub_id

pytest.importorskip("huggingface_hub")
NAME = "ada/pusht-edge"

LOAD = """
import json, sys
from vqbet_edge import EdgePolicy
from vqbet_edge.errors import VQBeTEdgeError
for name, options in json.loads(sys.argv[1]):
    try:
        policy = EdgePolicy.load(name, "onnxruntime", **options)
    except VQBeTEdgeError as error:
        print(json.dumps({"kind": type(error).__name__, "error": str(error)}))
    else:
        print(json.dumps({"sha256": policy.manifest.manifest_sha256}))
"""


@pytest.fixture
def server() -> Iterator[hub.Hub]:
    with hub.serving() as found:
        yield found


def files(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir()}


def load(variables: dict[str, str], *names: str, revisions: tuple[Any, ...] = (None,)) -> list[Any]:
    """`EdgePolicy.load` in a process of its own: the client reads its settings once."""
    calls = [(n, {} if r is None else {"revision": r}) for n in names for r in revisions]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(calls)],
        env=os.environ | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_bundle_is_downloaded_and_kept(server: hub.Hub, mini: Path, tmp_path: Path) -> None:
    """Only what the manifest names; afterwards without the network."""
    sha256 = Bundle.open(mini).manifest.manifest_sha256
    server.add(NAME, {**files(mini), "README.md": b"# card", "video.mp4": b"\0" * 1000})
    variables = server.variables(tmp_path)
    assert load(variables, NAME) == [{"sha256": sha256}]
    fetched = {request.rpartition("/")[2] for request in server.requests if "resolve" in request}
    assert fetched == set(files(mini))
    offline = {**variables, "HF_HUB_OFFLINE": "1"}
    server.requests.clear()
    assert load(offline, NAME) == [{"sha256": sha256}]
    assert server.requests == []


def test_a_snapshot_is_a_bundle_unless_its_links_lead_elsewhere(
    server: hub.Hub, mini: Path, tmp_path: Path
) -> None:
    """Its files are links into the cache's store, which `hf download` prints the path of."""
    commit = server.add(NAME, files(mini))
    load(server.variables(tmp_path), NAME)
    (snapshot,) = tmp_path.glob(f"hub/models--*/snapshots/{commit}")
    assert (snapshot / "gpt.onnx").is_symlink()
    assert EdgePolicy.load(snapshot, "onnxruntime").manifest == Bundle.open(mini).manifest
    for target in (mini / "gpt.onnx", "../../blobs/../snapshots", "../../blobs/" + "0" * 64):
        (snapshot / "gpt.onnx").unlink()
        (snapshot / "gpt.onnx").symlink_to(target)
        with pytest.raises(Exception, match=r"is a link|cannot read"):
            Bundle.open(snapshot)


def test_revisions(server: hub.Hub, mini: Path, tiny: Any, tmp_path: Path) -> None:
    """A tag, a commit, and the main branch."""
    first = server.add(NAME, files(mini), "v1")
    server.add(NAME, files(tiny.bundle))
    old, new = (Bundle.open(path).manifest.manifest_sha256 for path in (mini, tiny.bundle))
    variables = server.variables(tmp_path)
    *digests, found = load(variables, NAME, revisions=("v1", first, "main", None, "v7"))
    assert digests == [{"sha256": digest} for digest in (old, old, new, new)]
    assert found["kind"] == "BundleError"
    assert "v7" in found["error"]


def test_what_is_not_there(server: hub.Hub, tmp_path: Path) -> None:
    server.add("ada/checkpoint", {"model.safetensors": b"", "config.json": b"{}"})
    variables = server.variables(tmp_path)
    missing, checkpoint = load(variables, "ada/nothing", "ada/checkpoint")
    assert missing["kind"] == "BundleError"
    assert "'ada/nothing' does not exist here, and cannot be read from the Hub" in missing["error"]
    assert "holds no manifest.json, so it is no bundle" in checkpoint["error"]
    (offline,) = load({**variables, "HF_HUB_OFFLINE": "1"}, NAME)
    assert offline["kind"] == "BundleError"
    (unplugged,) = load({**variables, "HF_ENDPOINT": "http://127.0.0.1:9"}, NAME)
    assert unplugged["kind"] == "BundleError"
    assert "\n" not in unplugged["error"]


def test_paths_never_ask_the_hub(mini: Path, cwd: Path) -> None:
    """What is here, and what is spelled like a bundle or a path."""
    (cwd / "ada").mkdir()
    (cwd / NAME).symlink_to(mini)
    assert EdgePolicy.load(NAME, "onnxruntime").manifest.image_keys == ("observation.image",)
    for name in ("outputs/pusht.bundle", "./ada/other", "/nowhere/x", "a/b/c", "pusht", "../a"):
        assert not is_hub_id(name)
        with pytest.raises(BundleError, match="is not a bundle: expected a directory"):
            EdgePolicy.load(name)
    for name, reason in ((NAME, "is a path here"), ("x.bundle", "is not spelled user/name")):
        with pytest.raises(UsageError, match=reason):
            EdgePolicy.load(name, revision="v1")


def test_without_the_client(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="to read it from the Hub: pip install huggingface_hub"):
        EdgePolicy.load(NAME)

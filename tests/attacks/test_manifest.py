"""Manifests that somebody has changed: our error or an equally consistent manifest, at once."""

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import miniature
import numpy as np
import pytest
from attacks.manifests import mutated_bytes, mutated_values, sealed, spelled
from torture import cases, counts

from vqbet_edge import BundleError, EdgePolicy, VQBeTEdgeError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest


@pytest.fixture(scope="module")
def manifest(mini: Path) -> bytes:
    return (mini / MANIFEST_NAME).read_bytes()


@contextmanager
def one_second() -> Iterator[None]:
    """Fails after a second of the processor's time, however busy the machine is."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError("a manifest took more than a second")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def decoded(data: bytes) -> Manifest | None:
    """The manifest, None where it is refused; any other error is ours."""
    try:
        with one_second():
            manifest = decode_manifest(data)
    except BundleError:
        return None
    assert encode_manifest(manifest) == data
    return manifest


@pytest.mark.parametrize("count", counts(300, 3_000, 50_000))
def test_mutated_texts(manifest: bytes, count: int) -> None:
    random = np.random.default_rng(1)
    for _ in range(count):
        changed = mutated_bytes(manifest, random)
        assert changed == manifest or decoded(changed) is None
        decoded(sealed(changed))


@pytest.mark.parametrize("count", counts(300, 3_000, 50_000))
def test_mutated_values_that_are_accepted_act_or_are_refused_later(
    manifest: bytes, mini: Path, tmp_path: Path, count: int
) -> None:
    random, value = np.random.default_rng(2), json.loads(manifest)
    bundle = Path(shutil.copytree(mini, tmp_path / "a.bundle"))
    accepted = 0
    for _ in range(count):
        data = spelled(mutated_values(value, random))
        if decoded(data) is None or data == manifest:
            continue
        accepted += 1
        if accepted > cases(20, 1000):
            continue
        (bundle / MANIFEST_NAME).write_bytes(data)
        try:
            policy = EdgePolicy.load(bundle, backend="onnxruntime")
            policy.act(miniature.observation(random))
        except VQBeTEdgeError:
            continue
    assert accepted  # such as another temperature or another name of the checkpoint


NUMBER = b'"n_obs_steps": 5'
# What takes long or deep recursion, and what other parsers accept or repair.
CORPUS: dict[str, bytes | tuple[bytes, bytes]] = {
    "key twice, escaped": (NUMBER, NUMBER + b',\n  "n_obs\\u005fsteps": 5'),
    "NaN": (NUMBER, b'"n_obs_steps": NaN'),
    "number beyond float64": (b'"bet_softmax_temperature": 0.1', b'"bet_softmax_temperature": 1e999'),
    "digits without end": (NUMBER, b'"n_obs_steps": ' + b"9" * 500_000),
    "negative zero": (b'"top": 2', b'"top": -0'),
    "deep arrays": b"[" * 500_000,
    "deep value": (NUMBER, b'"n_obs_steps": ' + b"[" * 400_000 + b"]" * 400_000),
    "huge": b" " * (MAX_MANIFEST_BYTES + 1),
    "just not huge": b" " * MAX_MANIFEST_BYTES,
    "byte order mark": (b"{\n", b"\xef\xbb\xbf{\n"),
    "UTF-16": "{}".encode("utf-16"),
    "overlong UTF-8": (b'"miniature"', b'"\xc0\xaf"'),
    "lone surrogate": (b'"miniature"', b'"\\ud800"'),
    "escape sequence": (b'"miniature"', b'"\\u001b[2J"'),
    "carriage returns": (b"\n", b"\r\n"),
    "comment": (b"{\n", b"{ // all is well\n"),
    "two documents": (b"\n}\n", b"\n}\n{}\n"),
    "empty": b"",
    "endless shape": (b'"shape": [\n        2\n      ]', b'"shape": [' + b"9," * 400_000 + b"9]"),
    "hundred thousand keys": (b'"tools": {', b'"tools": {' + b"".join(b'"%d":"",' % n for n in range(90_000))),
}  # fmt: skip


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(manifest: bytes, name: str) -> None:
    entry = CORPUS[name]
    data = entry if isinstance(entry, bytes) else sealed(manifest.replace(*entry))
    assert data != manifest
    assert decoded(data) is None


def test_a_manifest_over_a_mebibyte_is_not_read(mini: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(mini, tmp_path / "a.bundle"))
    with (bundle / MANIFEST_NAME).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: a terabyte
    with pytest.raises(BundleError, match="too large"):
        Bundle.open(bundle)

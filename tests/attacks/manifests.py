"""Mutations of a manifest: of its bytes, and of its values under the canonical spelling."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

# What parsers trip over.
_BYTES = [
    b"\0", b"\xff", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"1e999", b"-0", b"[" * 2000, b"{" * 2000,
    b'"', b"\\", b"\\u0000", b"\\ud800", b"9" * 400, b"../", b"/etc/passwd", b"null", b"true", b",",
    b":", b"}", b"]", b'"files": {},', b"\n", b" " * 5000, b"1.0000000000000001", b"\xf4\x90\x80\x80",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, (1 << 31) + 1, 1 << 63, 1 << 64, -(1 << 63), 0.0, 0.5,
    1e-320, 1e308, "", "a", "A" * 5000, "gpt.onnx", "../gpt.onnx", "/etc/passwd", "GPT.onnx",
    "gpt.onnx\n", "gpt.onnx/", "manifest.json", "CON.txt", "\x1b[31m", "\u202e", "\ud7ff", "é",
    [], {}, [[]], [1] * 9, [1 << 31] * 8, [0], [-1], ["x"], {"a": 1}, "fp16", "uint8", "VISUAL",
]  # fmt: skip


_SEAL = re.compile(rb'"manifest_sha256": "[0-9a-f]{64}"\n}\n\Z')


def sealed(text: bytes) -> bytes:
    """A manifest's text with the digest that fits it, as somebody who forges it would write."""

    def seal(digest: str) -> bytes:
        return _SEAL.sub(b'"manifest_sha256": "%s"\n}\n' % digest.encode(), text)

    return seal(hashlib.sha256(seal("0" * 64)).hexdigest())


def spelled(value: object) -> bytes:
    """A value as the exporter would spell it."""
    text = json.dumps(value, ensure_ascii=False).encode()
    # Python writes 1e-06 and 1e+22 where msgspec writes 1e-6 and 1e22.
    text = re.sub(rb"(?<=\d)e(?:\+|(-))0*(?=\d)", rb"e\1", text)
    return sealed(msgspec.json.format(text, indent=2) + b"\n")


def reseal(bundle: Path, changed: Mapping[str, bytes]) -> None:
    """Put files into a bundle, with the digests that fit them."""
    # Not `json`: of 0.00001 it makes 1e-05.
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes())
    for name, data in changed.items():
        (bundle / name).write_bytes(data)
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    (bundle / "manifest.json").write_bytes(sealed(text))


def mutated_bytes(data: bytes, random: np.random.Generator) -> bytes:
    """One to four changes of the text."""
    text = bytearray(data)
    for _ in range(random.integers(1, 5)):
        start = int(random.integers(len(text) + 1))
        stop = start + int(random.choice([0, 1, 1, 2, 8, 64]))
        match random.integers(5):
            case 0:
                text[start:stop] = _BYTES[random.integers(len(_BYTES))]
            case 1:
                text[start:stop] = random.bytes(stop - start)
            case 2:
                text[start:stop] = b""
            case 3:
                other = int(random.integers(len(text) + 1))
                text[start:start] = text[other : other + 200]
            case _:
                if start < len(text):
                    text[start] ^= 1 << int(random.integers(8))
    return bytes(text)


def mutated_values(value: Any, random: np.random.Generator) -> Any:
    """One to three changes of the values, keys or their order."""
    changed = copy.deepcopy(value)
    for _ in range(random.integers(1, 4)):
        _change(changed, random)
    return changed


def _change(root: Any, random: np.random.Generator) -> None:
    parents = list(_containers(root))
    parent = parents[random.integers(len(parents))]
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    if not keys:
        return
    key, other = (keys[random.integers(len(keys))] for _ in range(2))
    match random.integers(6):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[str(_VALUES[random.integers(len(_VALUES))])] = parent.pop(key)
        case 2:
            parent[key], parent[other] = parent[other], parent[key]
        case 3:
            donor = parents[random.integers(len(parents))]
            parent[key] = copy.deepcopy(donor)
        case 4 if isinstance(parent[key], int | float):
            parent[key] = parent[key] + int(random.integers(-3, 4))
        case _:
            parent[key] = copy.deepcopy(_VALUES[random.integers(len(_VALUES))])


def _containers(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for child in value.values() if isinstance(value, dict) else value:
            yield from _containers(child)

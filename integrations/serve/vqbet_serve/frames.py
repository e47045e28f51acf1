"""The openpi protocol's frames: MessagePack with NumPy arrays as maps.

An array is the map {b"__ndarray__": True, b"data": bytes, b"dtype": NumPy's code, b"shape": [...]}
with binary keys (`openpi_client.msgpack_numpy`). Read, but never written, are texts as keys, and
the names of the package msgpack-numpy: {b"nd": True, b"type": code, b"kind": b"", ...}. Nothing in
a frame is code. A frame of too many values is refused by its headers. What nobody asks for is never
decoded, and nothing reaches NumPy before its type, its shape and its number of bytes agree.
"""

import math
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import ObservationError, UsageError

#: A frame's keys and their values, which are not decoded yet.
Message: TypeAlias = dict[str, msgspec.Raw]
#: RoboArena's answer to `endpoint: reset`.
RESET_DONE = "reset successful"
#: Types that arrays may have.
DTYPES = {code: np.dtype(code) for code in ("|u1", "<f4", "<f8")}
_Shape = Annotated[list[Annotated[int, msgspec.Meta(ge=1)]], msgspec.Meta(max_length=8)]
_ENCODER = msgspec.msgpack.Encoder()
_Type = TypeVar("_Type")
# Keys, items and values within values. To skip a value takes as long as to send ten bytes.
_MOST_VALUES = 4096
# A text's header, and the bytes of a character.
_TEXT_HEADER, _CHARACTER = 5, 4


def pack(message: object) -> bytes:
    """A frame: an array, or a map of arrays, numbers, texts and such maps.

    Raises:
        ObservationError: an array has another type than `DTYPES`.
    """
    return _ENCODER.encode(_plain("array", message))


def _plain(key: str, value: object) -> object:
    match value:
        case np.ndarray():
            if value.dtype.str not in DTYPES:
                raise ObservationError(
                    f"'{key}': expected uint8, float32 or float64, got {value.dtype}"
                )
            return {
                b"__ndarray__": True,
                b"data": value.tobytes(),
                b"dtype": value.dtype.str,
                b"shape": value.shape,
            }
        case Mapping():
            return {name: _plain(name, child) for name, child in value.items()}
        case _:
            return value


def unpack(frame: bytes) -> Message:
    """The keys of a frame's map.

    Raises:
        UsageError: it is no MessagePack map with texts as keys, or has too many values.
    """
    check_values(frame)
    try:
        return _decoded(frame, Message)
    except ValueError as error:
        raise UsageError(f"expected a MessagePack map, got {error}") from error


class _Header(NamedTuple):
    """What the first byte of a value announces."""

    width: int = 0  # bytes of the length that follows
    size: int = 0  # bytes of the value behind that
    values: int = 0  # within it
    per: int = 0  # values within it per length; 0 where the length counts bytes


# By a value's first byte.
_HEADERS = [
    *[_Header()] * 0x80,  # numbers up to 127
    *(_Header(values=2 * pairs) for pairs in range(16)),  # maps
    *(_Header(values=items) for items in range(16)),  # arrays
    *(_Header(size=size) for size in range(32)),  # texts
    *[_Header()] * 4,  # nil, truth
    *(_Header(width) for width in (1, 2, 4)),  # bytes
    *(_Header(width, size=1) for width in (1, 2, 4)),  # extensions, with their type
    *(_Header(size=size) for size in (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)),  # numbers
    *(_Header(size=1 + size) for size in (1, 2, 4, 8, 16)),  # extensions
    *(_Header(width) for width in (1, 2, 4)),  # texts
    *(_Header(width, per=1) for width in (2, 4)),  # arrays
    *(_Header(width, per=2) for width in (2, 4)),  # maps
    *[_Header()] * 0x20,  # numbers from -32
]


def check_values(frame: bytes) -> None:
    """Look at a frame's headers only; whether it is MessagePack at all is for who decodes it.

    Raises:
        UsageError: it has more values than any request or answer needs.
    """
    at, end, left, announced = 0, len(frame), 1, 1
    while left and at < end:
        width, size, values, per = _HEADERS[frame[at]]
        at += 1
        if width:
            length = int.from_bytes(frame[at : at + width], "big")
            at += width
            values, size = length * per, size + (0 if per else length)
        at += size
        left += values - 1
        announced += values
        if announced > _MOST_VALUES:
            raise UsageError(
                f"expected at most {_MOST_VALUES} keys and values in a frame, got {announced} or "
                "more; send arrays as openpi_client.msgpack_numpy packs them, and no lists"
            )


def text(message: Message, key: str, longest: int) -> str | None:
    """A text of a frame; None where the key is missing or its value is nil.

    Raises:
        UsageError: it is none, or longer than allowed.
    """
    size = memoryview(message.get(key, b"")).nbytes
    if size > _TEXT_HEADER + _CHARACTER * longest:
        raise UsageError(f"'{key}': expected 1 to {longest} characters, got {size} bytes")
    value: str | None = _value(message, key, str | None, f"text of 1 to {longest} characters")
    if value is not None and not 0 < len(value) <= longest:
        raise UsageError(f"'{key}': expected 1 to {longest} characters, got {len(value)}")
    return value


def number(message: Message, key: str) -> int | None:
    """A number of a frame, 0 or more; None where the key is missing or its value is nil.

    Raises:
        UsageError: it is none.
    """
    limits = Annotated[int, msgspec.Meta(ge=0)] | None
    value: int | None = _value(message, key, limits, "whole number of 0 or more")
    return value


def _value(message: Message, key: str, kind: Any, expected: str) -> Any:  # noqa: ANN401
    try:
        return _decoded(message[key], kind) if key in message else None
    except ValueError as error:
        raise UsageError(f"'{key}': expected a {expected}, got {error}") from error


def array(key: str, value: msgspec.Raw) -> NDArray[Any]:
    """An array of a frame, as a read-only view of its bytes.

    Raises:
        ObservationError: it is none, or its parts contradict each other.
    """
    parts = _parts(key, value)
    flag, code_key = ("nd", "type") if "nd" in parts else ("__ndarray__", "dtype")
    try:
        marked = _decoded(parts[flag], bool)
        data = _decoded(parts["data"], bytes)
        code = _decoded(parts[code_key], str)
        shape = _decoded(parts["shape"], _Shape)
        special = _decoded(parts.get("kind", _NIL), Any)
    except (ValueError, KeyError) as error:
        raise ObservationError(f"'{key}': {_EXPECTED}, got {_what(value)} ({error})") from error
    if not marked or special or code not in DTYPES:
        raise ObservationError(f"'{key}': expected dtype {', '.join(DTYPES)}, got {code[:40]!r}")
    expected = math.prod(shape) * DTYPES[code].itemsize
    if len(data) != expected:
        raise ObservationError(
            f"'{key}': {code} {tuple(shape)} takes {expected} bytes, got {len(data)}"
        )
    if data[:8].startswith(_FILES) and len(shape) < 3:
        raise ObservationError(f"'{key}': {_EXPECTED}, got {_file(data)}")
    return np.frombuffer(data, DTYPES[code]).reshape(shape)


_EXPECTED = "expected an array as openpi_client.msgpack_numpy packs it"
_NIL = msgspec.Raw(b"\xc0")


def _parts(key: str, value: msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The parts of an array by name, whether they are texts or bytes."""
    try:
        parts = _decoded(value, dict[Any, msgspec.Raw])
        names = [part.decode() if isinstance(part, bytes) else part for part in parts]
    except ValueError as error:
        raise ObservationError(f"'{key}': {_EXPECTED}, got {_what(value)}") from error
    if len(set(names)) < len(names):
        raise ObservationError(f"'{key}': {_EXPECTED}, got {_what(value)}: names twice")
    return dict(zip(names, parts.values(), strict=True))


def _what(value: msgspec.Raw) -> str:
    """What came instead of an array, in words."""
    try:
        decoded = _decoded(value, Any)
    except ValueError as error:
        return str(error)
    if isinstance(decoded, bytes) and decoded.startswith(_FILES):
        return _file(decoded)
    if not isinstance(decoded, dict):
        return _WORDS.get(type(decoded), f"a value of the type {type(decoded).__name__}")
    names = (name.decode(errors="replace") if isinstance(name, bytes) else name for name in decoded)
    return f"a map with the keys {', '.join(ascii(name)[:40] for name in islice(names, 8))}"


def _file(data: bytes) -> str:
    kind = "JPEG" if data.startswith(_FILES[0]) else "PNG"
    return f"a {kind} file; decode it on the robot, and send uint8 (height, width, 3), RGB"


# How JPEG and PNG begin. They are not decoded here: that takes native code, or a second.
_FILES = b"\xff\xd8\xff", b"\x89PNG\r\n"
_WORDS = {str: "a text", bytes: "bytes", list: "a list", type(None): "nothing (nil)"}


def _decoded(data: bytes | msgspec.Raw, kind: type[_Type]) -> _Type:
    """Decode, and raise nothing but ValueError: msgspec's errors and UnicodeDecodeError are."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except RecursionError as error:
        raise ValueError("maps within maps without end") from error

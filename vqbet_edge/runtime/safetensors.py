"""Strict reader of the safetensors format, so that the robot needs no package for it.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the tensors' bytes without holes (github.com/huggingface/safetensors, "Format").
"""

import math
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from vqbet_edge.errors import BundleError

MAX_HEADER_BYTES = 1 << 20
_Size = Annotated[int, Meta(ge=0, le=1 << 40)]
# The product of a shape with 400,000 axes takes 20 seconds.
_Shape = Annotated[tuple[_Size, ...], Meta(max_length=8)]


class _Entry(Struct, forbid_unknown_fields=True):
    dtype: Literal["F32"]
    shape: _Shape
    data_offsets: tuple[_Size, _Size]


def read_safetensors(data: bytes, source: str) -> dict[str, NDArray[np.float32]]:
    """Arrays of a safetensors file; they are read-only views of `data`.

    Args:
        data: the whole file.
        source: the file's name, for the error.

    Raises:
        BundleError: the file does not follow the format or has other types than F32.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise BundleError(f"{source}: the safetensors header is truncated; export again")
    try:
        header = msgspec.json.decode(data[8 : 8 + length], type=dict[str, _Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{source}: the safetensors header is invalid: {error}") from error
    body, end = memoryview(data)[8 + length :], 0
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop - start != math.prod(entry.shape) * 4:
            raise BundleError(f"{source}: the bytes of '{name}' do not fit its shape; export again")
        if stop > len(body):
            raise BundleError(f"{source}: '{name}' reaches past the end; export again")
        try:
            arrays[name] = np.frombuffer(body[start:stop], "<f4").reshape(entry.shape)
        except ValueError as error:
            raise BundleError(f"{source}: the shape of '{name}' is impossible: {error}") from error
        end = stop
    if end != len(body):
        raise BundleError(f"{source}: {len(body) - end} bytes belong to no tensor; export again")
    return arrays

"""Malformed observations: each is named, and the history is as if the call had never happened."""

import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies
from hypothesis.extra import numpy as arrays
from miniature import IMAGE, SIZE, STATE

from vqbet_edge import EdgePolicy, ObservationError

Observation = dict[str, Any]


def chw(image: np.ndarray) -> np.ndarray:
    result: np.ndarray = image.transpose(2, 0, 1).astype(np.float32) / 255
    return result


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy.flat[copy.size // 2] = value
    return copy


class Raising:
    """Claims to be an array."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise self._error


class Lying:
    """Claims to be an array of another kind."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        return np.array([object(), object()])


def image(change: Callable[[np.ndarray], Any]) -> Callable[[Observation], Any]:
    return lambda o: {**o, IMAGE: change(o[IMAGE])}


def state(change: Callable[[np.ndarray], Any]) -> Callable[[Observation], Any]:
    return lambda o: {**o, STATE: change(o[STATE])}


def floats(change: Callable[[np.ndarray], Any]) -> Callable[[Observation], Any]:
    return image(lambda i: change(chw(i)))


NO_IMAGE = rf"'{IMAGE}' is missing: expected .* got "
NO_STATE = rf"'{STATE}' is missing: expected .* got "
SHAPE = rf"'{IMAGE}': expected uint8 \({SIZE}, {SIZE}, 3\) or float32 \(3, {SIZE}, {SIZE}\) in \[0, 1\], got "
RANGE = rf"'{IMAGE}': expected float32 values in \[0, 1\], got "
STATES = rf"'{STATE}': expected float32 \(2,\), got "
FINITE = rf"'{STATE}': expected finite values, got "
IMAGE_ARRAY = rf"'{IMAGE}': expected a NumPy array, got "
STATE_ARRAY = rf"'{STATE}': expected a NumPy array, got "

REFUSED: dict[str, tuple[Callable[[Observation], Any], str]] = {
    # What is no observation at all.
    "None": (lambda _: None, r"expected a mapping .* got NoneType"),
    "a list": (lambda o: list(o.values()), r"expected a mapping .* got list"),
    "an array": (lambda o: o[IMAGE], r"expected a mapping .* got ndarray"),
    "keys": (set, r"expected a mapping .* got set"),
    # Keys.
    "empty": (lambda _: {}, NO_IMAGE + r"\[\]"),
    "no state": (lambda o: {IMAGE: o[IMAGE]}, NO_STATE + rf"\['{IMAGE}'\]"),
    "image None": (image(lambda _: None), r"'observation.image' is None, expected an array"),
    "nested": (lambda o: {"observation": {"image": o[IMAGE], "state": o[STATE]}}, NO_IMAGE),
    "numbers as keys": (lambda o: dict(enumerate(o.values())), NO_IMAGE + r"\['0', '1'\]"),
    "default dict": (lambda o: collections.defaultdict(lambda: None, {STATE: o[STATE]}), NO_IMAGE),
    # Values that are no arrays.
    "image list": (image(np.ndarray.tolist), IMAGE_ARRAY + "list"),
    "image path": (image(lambda _: Path("frame.png")), IMAGE_ARRAY + r"(Posix)?Path"),
    "image memory": (image(memoryview), IMAGE_ARRAY + "memoryview"),
    "state number": (state(lambda _: 1.0), STATE_ARRAY + "float"),
    "array that raises": (state(lambda _: Raising(ValueError("no"))), rf"'{STATE}' cannot be read as an array \(no\)"),
    "array without memory": (state(lambda _: Raising(MemoryError())), rf"'{STATE}' cannot be read as an array"),
    "array that is another": (state(lambda _: Lying()), STATES + "object"),
    "tensor with gradients": (state(lambda s: torch.from_numpy(s).requires_grad_()), rf"'{STATE}' cannot be read as an array .*detach"),
    "sparse tensor": (state(lambda s: torch.from_numpy(s).to_sparse()), rf"'{STATE}' cannot be read as an array"),
    "half-precision tensor": (state(lambda s: torch.from_numpy(s).half()), STATES + "float16"),
    "masked state": (state(lambda s: np.ma.masked_array(s, [True, False])), rf"'{STATE}': expected .* masked"),
    # Shapes and types that others have; all others are drawn below.
    "image CHW": (image(lambda i: i.transpose(2, 0, 1)), SHAPE + rf"uint8 \(3, {SIZE}, {SIZE}\)"),
    "image with alpha": (image(lambda i: np.dstack([i, i[..., :1]])), SHAPE + rf"uint8 \({SIZE}, {SIZE}, 4\)"),
    "image cropped": (image(lambda i: i[:20, :20]), SHAPE + r"uint8 \(20, 20, 3\); the policy was trained on 24x24"),
    "image batch of two": (image(lambda i: np.stack([i, i])), SHAPE + rf"uint8 \(2, {SIZE}, {SIZE}, 3\)"),
    "image huge": (image(lambda _: np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20, 3))), SHAPE + r"uint8 \(1048576, "),
    "image float64": (floats(lambda i: i.astype(np.float64)), SHAPE + "float64"),
    "image float32 HWC": (image(lambda i: i.astype(np.float32)), SHAPE + rf"float32 \({SIZE}, {SIZE}, 3\)"),
    "image of records": (image(lambda i: i.view([("r", "u1"), ("g", "u1"), ("b", "u1")])), SHAPE),
    "state long": (state(lambda s: np.append(s, s)), STATES + r"float32 \(4,\)"),
    "state of integers": (state(lambda s: s.astype(np.int64)), STATES + "int64"),
    "state big-endian": (state(lambda s: s.astype(">f8")), STATES + ">f8"),
    # Values.
    "image 0 to 255": (floats(lambda i: i * 255), RANGE + r"0\.0 to 25\d\.0; divide by 255"),
    "image a bit negative": (floats(lambda i: spoiled(i, -1e-6)), RANGE + "-9.99"),
    "image a bit bright": (floats(lambda i: spoiled(i, 1.0000001)), RANGE + r"0\.0 to 1\.0000001"),
    "image NaN": (floats(lambda i: spoiled(i, np.nan)), RANGE + "nan"),
    "image infinite": (floats(lambda i: spoiled(i, np.inf)), RANGE + r"0\.0 to inf"),
    "NaN outside the crop": (floats(lambda i: np.where(np.indices(i.shape).sum(0) == 0, np.float32(np.nan), i)), RANGE + "nan"),
    "state NaN": (state(lambda s: spoiled(s, np.nan)), FINITE + r"\[.*nan"),
    "state infinite": (state(lambda s: spoiled(s, -np.inf)), FINITE + r"\[.*-inf"),
    "state beyond float32": (state(lambda s: spoiled(s.astype(np.float64), 1e300)), FINITE + r"\[.*e\+300"),
    "state that scales to infinity": (state(lambda s: spoiled(s, 3e38) * np.float32(10)), FINITE),
}  # fmt: skip

ACCEPTED: dict[str, Callable[[Observation], Any]] = {
    "batched": lambda o: {key: value[None] for key, value in o.items()},
    "batched float32": lambda o: {IMAGE: chw(o[IMAGE])[None], STATE: o[STATE][None]},
    "Fortran order": lambda o: {key: np.asfortranarray(value) for key, value in o.items()},
    "float32 Fortran order": floats(np.asfortranarray),
    "strided": lambda o: {IMAGE: o[IMAGE].repeat(2, 1)[:, ::2], STATE: o[STATE].repeat(3)[::3]},
    "backwards in memory": lambda o: {k: v[::-1].copy()[::-1] for k, v in o.items()},
    "unaligned and read-only": lambda o: {
        key: np.frombuffer(b"x" + value.tobytes(), np.uint8)[1:].view(value.dtype).reshape(value.shape)
        for key, value in o.items()
    },
    "float64 state": state(lambda s: s.astype(np.float64)),
    "a mask that hides nothing": state(lambda s: np.ma.masked_array(s, [False, False])),
    "subclass": image(lambda i: np.asanyarray(i).view(np.memmap)),
    "other keys": lambda o: {"task": "push", "timestamp": 3.0, **o, 7: None},
    "chain map": lambda o: collections.ChainMap({}, o),
    "tensors": lambda o: {key: torch.from_numpy(value) for key, value in o.items()},
}  # fmt: skip


def load(mini: Path) -> EdgePolicy:
    return EdgePolicy.load(mini, backend="onnxruntime", temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def policy(mini: Path) -> EdgePolicy:
    return load(mini)


@pytest.fixture
def observations() -> list[Observation]:
    random = np.random.default_rng(7)
    return [miniature.observation(random) for _ in range(len(REFUSED) + 1)]


def test_refused_by_name_without_a_trace(mini: Path, observations: list[Observation]) -> None:
    policy, plain = load(mini), load(mini)
    for observation, (name, (change, message)) in zip(observations, REFUSED.items(), strict=False):
        with np.errstate(all="ignore"), pytest.raises(ObservationError) as refused:
            policy.act(change(observation))
        text = str(refused.value)
        assert re.search(message, text), (name, text)
        assert len(text) < 1000, name
        with np.errstate(all="ignore"), pytest.raises(ObservationError):
            policy.act_chunk(change(observation))
        np.testing.assert_array_equal(policy.act(observation), plain.act(observation), name)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_variants_act_bitwise_the_same(
    mini: Path, observations: list[Observation], name: str
) -> None:
    policy, plain = load(mini), load(mini)
    for observation in observations[:12]:
        variant = ACCEPTED[name](observation)
        np.testing.assert_array_equal(policy.act(variant), plain.act(observation))


@given(strategies.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_arrays_of_any_other_type_or_shape_are_refused(policy: EdgePolicy, data: Any) -> None:
    observation = miniature.observation(np.random.default_rng(7))
    key = data.draw(strategies.sampled_from([IMAGE, STATE]))
    dtype = data.draw(arrays.scalar_dtypes())
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=30))
    fits = {IMAGE: {("uint8", (SIZE, SIZE, 3)), ("float32", (3, SIZE, SIZE))},
            STATE: {("float32", (2,)), ("float64", (2,))}}[key]  # fmt: skip
    bare = shape[1:] if len(shape) > 1 and shape[0] == 1 else shape
    assume((dtype.name, bare) not in fits or not dtype.isnative)
    with pytest.raises(ObservationError, match=SHAPE if key == IMAGE else STATES):
        policy.act({**observation, key: np.zeros(shape, dtype)})

"""What observations are accepted, and what every refused one is told."""

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from workshop import Exported

from vqbet_edge import EdgePolicy, ObservationError

STATE, IMAGE = "observation.state", "observation.image"


@pytest.fixture(scope="module")
def policy(tiny: Exported) -> EdgePolicy:
    return EdgePolicy.load(tiny.bundle, temperature=0)


@pytest.fixture
def observation() -> dict[str, np.ndarray]:
    return oracle.observations(oracle.TINY, 1)[0]


def as_lerobot(image: np.ndarray) -> np.ndarray:
    result: np.ndarray = image.transpose(2, 0, 1).astype(np.float32) / 255
    return result


ACCEPTED: dict[str, Any] = {
    "float32 CHW": lambda o: {**o, IMAGE: as_lerobot(o[IMAGE])},
    "batched": lambda o: {key: value[None] for key, value in o.items()},
    "batched float32": lambda o: {IMAGE: as_lerobot(o[IMAGE])[None], STATE: o[STATE][None]},
    "float64 state": lambda o: {**o, STATE: o[STATE].astype(np.float64)},
    "Fortran order": lambda o: {key: np.asfortranarray(value) for key, value in o.items()},
    "strided view": lambda o: {
        IMAGE: np.repeat(o[IMAGE], 2, axis=1)[:, ::2],
        STATE: np.repeat(o[STATE], 3)[::3],
    },
    "read-only": lambda o: {
        key: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape)
        for key, value in o.items()
    },
    "other keys too": lambda o: {**o, "task": "push", "timestamp": 3.0},
    "torch tensors": lambda o: {
        IMAGE: torch.from_numpy(as_lerobot(o[IMAGE])),
        STATE: torch.from_numpy(o[STATE]),
    },
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_variants_act_bitwise_the_same(
    policy: EdgePolicy, observation: Any, name: str
) -> None:
    policy.reset()
    expected = policy.act_chunk(observation)
    policy.reset()
    np.testing.assert_array_equal(policy.act_chunk(ACCEPTED[name](observation)), expected)


def changed(image: np.ndarray, value: float) -> np.ndarray:
    copy = as_lerobot(image)
    copy[1, 2, 3] = value
    return copy


REFUSED: dict[str, tuple[Any, str]] = {
    "no mapping": (lambda o: list(o.values()), r"expected a mapping with .* got list"),
    "image missing": (lambda o: {STATE: o[STATE]}, r"'observation.image' is missing"),
    "state missing": (lambda o: {IMAGE: o[IMAGE]}, r"'observation.state' is missing"),
    "state None": (lambda o: {**o, STATE: None}, r"'observation.state' is None"),
    "list": (lambda o: {**o, STATE: [1.0, 2.0]}, r"expected a NumPy array, got list"),
    "tensor with gradients": (
        lambda o: {**o, STATE: torch.zeros(2, requires_grad=True)},
        r"'observation.state' cannot be read as an array .*detach\(\)",
    ),
    "uint8 CHW": (
        lambda o: {**o, IMAGE: o[IMAGE].transpose(2, 0, 1)},
        r"expected uint8 \(40, 48, 3\) or float32 \(3, 40, 48\) in \[0, 1\], "
        r"got uint8 \(3, 40, 48\)",
    ),
    "float32 HWC": (
        lambda o: {**o, IMAGE: o[IMAGE].astype(np.float32)},
        r"got float32 \(40, 48, 3\)",
    ),
    "float32 of 0 to 255": (
        lambda o: {**o, IMAGE: as_lerobot(o[IMAGE]) * 255},
        r"expected float32 values in \[0, 1\], got .*divide by 255",
    ),
    "float64 image": (
        lambda o: {**o, IMAGE: as_lerobot(o[IMAGE]).astype(np.float64)},
        r"got float64",
    ),
    "image NaN": (lambda o: {**o, IMAGE: changed(o[IMAGE], np.nan)}, r"got nan"),
    "image infinite": (lambda o: {**o, IMAGE: changed(o[IMAGE], np.inf)}, r"got .* to inf"),
    "image negative": (lambda o: {**o, IMAGE: changed(o[IMAGE], -0.1)}, r"got -0.1"),
    "image grey": (lambda o: {**o, IMAGE: o[IMAGE][..., 0]}, r"got uint8 \(40, 48\)"),
    "image RGBA": (lambda o: {**o, IMAGE: np.zeros((40, 48, 4), np.uint8)}, r"\(40, 48, 4\)"),
    "image resized": (lambda o: {**o, IMAGE: np.zeros((48, 40, 3), np.uint8)}, r"\(48, 40, 3\)"),
    "image empty": (lambda o: {**o, IMAGE: np.zeros((0, 48, 3), np.uint8)}, r"\(0, 48, 3\)"),
    "image int8": (lambda o: {**o, IMAGE: o[IMAGE].astype(np.int8)}, r"got int8"),
    "image bool": (lambda o: {**o, IMAGE: o[IMAGE] > 9}, r"got bool"),
    "image batch of 2": (
        lambda o: {**o, IMAGE: np.stack([o[IMAGE]] * 2)},
        r"got uint8 \(2, 40, 48, 3\)",
    ),
    "state too long": (lambda o: {**o, STATE: np.zeros(3, np.float32)}, r"\(2,\), got float32 \(3,"),
    "state too short": (lambda o: {**o, STATE: np.zeros(1, np.float32)}, r"got float32 \(1,\)"),
    "state scalar": (lambda o: {**o, STATE: np.float32(1)}, r"got float32 \(\)"),
    "state of integers": (lambda o: {**o, STATE: np.array([1, 2])}, r"got int64 \(2,\)"),
    "state of objects": (lambda o: {**o, STATE: np.array([1.0, None])}, r"got object"),
    "state of text": (lambda o: {**o, STATE: np.array(["1", "2"])}, r"got <U1"),
    "state big-endian": (lambda o: {**o, STATE: o[STATE].astype(">f4")}, r"got >f4"),
    "state NaN": (lambda o: {**o, STATE: np.array([1, np.nan], np.float32)}, r"finite values, got"),
    "state infinite": (lambda o: {**o, STATE: np.array([np.inf, 1], np.float32)}, r"finite values"),
    "state beyond float32": (lambda o: {**o, STATE: np.array([1e300, 1.0])}, r"finite values"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_observations_are_explained(
    policy: EdgePolicy, observation: Any, name: str
) -> None:
    change, message = REFUSED[name]
    policy.reset()
    with pytest.raises(ObservationError, match=message):
        policy.act(change(observation))
    assert policy.last is None

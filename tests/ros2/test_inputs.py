"""What the node makes of messages, without ROS: any object with a message's fields does."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vqbet_edge_ros import images
from vqbet_edge_ros.clock import MEMORY_S, StampClock
from vqbet_edge_ros.images import decode_compressed, decode_image
from vqbet_edge_ros.inputs import Input, Inputs, Observed, Refusal, conflicts
from vqbet_edge_ros.joints import Joints

from vqbet_edge import ObservationError, StaleObservationError, UsageError

SHAPE = (4, 6, 3)


def image(frame: np.ndarray, encoding: str, padding: int = 0) -> SimpleNamespace:
    height, width = frame.shape[:2]
    rows = np.pad(frame.reshape(height, -1), ((0, 0), (0, padding)), constant_values=77)
    return SimpleNamespace(height=height, width=width, encoding=encoding, step=rows.shape[1],
                           data=rows.tobytes())  # fmt: skip


@pytest.fixture
def frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
def test_colours_arrive_as_red_green_blue(frame: np.ndarray, encoding: str, padding: int) -> None:
    sent = frame if encoding.startswith("rgb") else frame[..., ::-1]
    if "a" in encoding:
        sent = np.concatenate([sent, np.full((*SHAPE[:2], 1), 9, np.uint8)], axis=-1)
    decoded = decode_image(image(sent, encoding, padding), SHAPE)
    np.testing.assert_array_equal(decoded, frame)
    assert decoded.flags.c_contiguous


def test_grey_has_three_equal_channels_and_it_is_said_once(
    frame: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    images._say_grey.cache_clear()
    grey = frame[..., 0]
    for message in (image(grey, "mono8", 3), image(grey, "mono8")):
        decoded = decode_image(message, SHAPE)
        np.testing.assert_array_equal(decoded, np.repeat(frame[..., :1], 3, axis=-1))
    decode_compressed(compressed(grey, "PNG"), SHAPE)
    assert caplog.text.count("frames are grey") == 1


def yuv(encoding: str, luma: np.ndarray, u: int, v: int) -> np.ndarray:
    """Packed bytes of one colour and many brightnesses."""
    height, width = luma.shape
    chroma = np.tile(np.array([u, v], np.uint8), (height, width // 2))
    match encoding.lower():
        case "yuyv" | "yuv422_yuy2":
            return np.stack([luma, chroma], axis=-1)
        case "uyvy" | "yuv422":
            return np.stack([chroma, luma], axis=-1)
        case _:
            half = chroma[: height // 2]
            return np.concatenate([luma, half if encoding.lower() == "nv12" else half ^ u ^ v])


@pytest.mark.parametrize("colour", [(128, 128), (90, 240), (240, 110)])
@pytest.mark.parametrize(
    ("encoding", "padding"),
    [("YUYV", 0), ("yuv422_yuy2", 6), ("uyvy", 6), ("yuv422", 0), ("NV12", 6), ("nv21", 0)],
)
def test_webcams_colours_are_those_that_ffmpeg_sees(
    encoding: str, colour: tuple[int, int], padding: int
) -> None:
    """BT.601 with black at 16, as cameras send it and as recordings are made of it."""
    height, width = 8, 16
    luma = np.random.default_rng(0).integers(16, 236, (height, width), np.uint8)
    sent = yuv(encoding, luma, *colour)
    message = image(sent, encoding, padding)
    message.height, message.width = height, width
    decoded = decode_image(message, (height, width, 3))
    plain = av.VideoFrame.from_ndarray(yuv("yuyv", luma, *colour), format="yuyv422")
    np.testing.assert_allclose(decoded, plain.to_ndarray(format="rgb24"), atol=3)


def test_yuv_says_what_it_needs(frame: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    message = image(np.zeros((4, 5, 2), np.uint8), "yuyv")
    with pytest.raises(ObservationError, match="even"):
        decode_image(message, (4, 5, 3))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ObservationError, match="python3-opencv"):
        decode_image(image(frame[..., :2], "yuyv"), SHAPE)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"encoding": "16UC1"}, "16UC1"),
        ({"encoding": "mono16"}, "mono16"),
        ({"encoding": "nv12"}, "6 rows of 6 bytes"),
        ({"height": 5}, "6x4"),
        ({"width": 7}, "7x4"),
        ({"step": 17}, "step of 17"),
        ({"data": b"\0" * 71}, "71 bytes"),
        ({"step": 19}, "step of 19"),
    ],
)
def test_damaged_images_are_refused(frame: np.ndarray, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ObservationError, match=said):
        decode_image(SimpleNamespace(**(vars(image(frame, "rgb8")) | changed)), SHAPE)


def compressed(frame: np.ndarray, kind: str) -> SimpleNamespace:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, kind)
    return SimpleNamespace(format=kind, data=out.getvalue())


def test_compressed_images(frame: np.ndarray) -> None:
    grey, only = np.full(SHAPE, 90, np.uint8), np.repeat(frame[..., :1], 3, axis=-1)
    alpha = np.random.default_rng(1).integers(0, 256, (*SHAPE[:2], 1), np.uint8)
    for sent, kind, expected in [
        (frame, "PNG", frame),
        (grey, "JPEG", grey),
        (frame[..., 0], "PNG", only),
        (np.concatenate([frame, alpha], axis=-1), "PNG", frame),
        (np.concatenate([frame[..., :1], alpha], axis=-1), "PNG", only),
    ]:
        np.testing.assert_array_equal(decode_compressed(compressed(sent, kind), SHAPE), expected)


def test_damaged_compressed_images_are_refused(frame: np.ndarray) -> None:
    whole, (_, deep) = compressed(frame, "PNG"), cv2.imencode(".png", np.full(SHAPE, 4000, "<u2"))
    for message in (
        SimpleNamespace(format="png", data=whole.data[:-30]),
        SimpleNamespace(format="jpeg", data=b"\xff\xd8" + bytes(range(200))),
        compressed(frame, "BMP"),
        compressed(np.zeros((4, 5, 3), np.uint8), "PNG"),
        compressed(np.zeros((4, 6), np.uint16), "PNG"),
        SimpleNamespace(format="png", data=deep.tobytes()),
    ):
        with pytest.raises(ObservationError):
            decode_compressed(message, SHAPE)


def state(**positions: float) -> SimpleNamespace:
    return SimpleNamespace(name=list(positions), position=list(positions.values()))


@given(st.permutations(["a", "b", "c", "d"]))
def test_joints_are_found_by_name(order: list[str]) -> None:
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    read = Joints(("b", "d", "a")).read(state(**{name: values[name] for name in order}))
    np.testing.assert_array_equal(read, [2, 4, 1])


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (state(a=1.0), "without \\['b'\\]"),
        (state(a=1.0, b=float("inf")), "finite"),
        (SimpleNamespace(name=["a", "b", "a"], position=[1.0, 2.0, 3.0]), "more than once"),
        (SimpleNamespace(name=["a", "b"], position=[1.0]), "2 positions, got 1"),
    ],
)
def test_wrong_joints_are_refused(message: SimpleNamespace, said: str) -> None:
    with pytest.raises(ObservationError, match=said):
        Joints(("a", "b")).read(message)


def test_values_without_units_are_the_same_bits() -> None:
    values = np.random.default_rng(1).normal(size=3).astype(np.float32)
    joints = Joints(("a", "b", "c"))
    assert (joints.to_ros(values) == values.astype(np.float64)).all()


@pytest.mark.parametrize(
    ("names", "scale", "offset"),
    [(("a", "a"), (), ()), (("a",), (0.0,), ()), (("a",), (1.0, 2.0), ()),
     (("a",), (), (float("nan"),)), (("a",), (float("inf"),), ())],
)  # fmt: skip
def test_wrong_joint_parameters_are_refused(names: Any, scale: Any, offset: Any) -> None:
    with pytest.raises(UsageError):
        Joints(names, "as_is", scale, offset)


SECOND = 1_000_000_000
# Some time of the wall clock, and of the monotonic clock, at the same moment.
WALL, NOW = 1_800_000_000 * SECOND, 50.0


def test_stamps_on_the_monotonic_clock() -> None:
    clock = StampClock(0.1)
    assert clock.place(WALL - SECOND // 4, WALL, NOW) == pytest.approx(NOW - 0.25, abs=1e-9)
    assert clock.place(WALL + SECOND // 20, WALL, NOW) == NOW
    assert clock.place(WALL - 3600 * SECOND, WALL, NOW) == pytest.approx(NOW - 3600)
    with pytest.raises(StaleObservationError, match=r"3600\.000 s in the future"):
        clock.place(WALL + 3600 * SECOND, WALL, NOW)


@given(
    jump=st.integers(-3600 * SECOND, 3600 * SECOND),
    age=st.floats(0, MEMORY_S * 0.9),
    since=st.floats(0, MEMORY_S * 0.9),
)
def test_no_jump_of_the_wall_clock_makes_a_stamp_younger(
    jump: int, age: float, since: float
) -> None:
    """The clock jumps `since` seconds before a frame comes that was taken `age` seconds before."""
    clock = StampClock(0.1)
    clock.compare(WALL, NOW)
    jumped, came = NOW + 0.01, NOW + 0.01 + since
    wall = WALL + round((came - NOW) * SECOND) + jump
    taken = came - age
    stamp = WALL + round((taken - NOW) * SECOND) + (jump if taken >= jumped else 0)
    try:
        placed = clock.place(stamp, wall, came)
    except StaleObservationError:
        return
    # A stamp that is a little ahead counts as now, but no more than that is forgiven.
    assert placed <= taken + 1e-6 or (abs(jump) <= 0.1 * SECOND and placed <= taken + 0.1 + 1e-6)


def test_a_jump_is_forgotten() -> None:
    clock, hour = StampClock(0.1), 3600 * SECOND
    clock.compare(WALL, NOW)
    for step in range(1, 60):
        now, wall = NOW + step / 30, WALL - hour + step * SECOND // 30
        placed = clock.place(wall, wall, now)
        assert placed == pytest.approx(now if step / 30 > MEMORY_S else now - 3600, abs=1e-6)


def make(
    max_age: float = 0.2, max_skew: float = 0.1, max_repeats: int = 100
) -> tuple[Input, Input, Inputs]:
    camera = Input("/camera", lambda message: message, max_age)
    joints = Input("/joints", Joints(("a",)).read, max_age)
    return camera, joints, Inputs({"image": camera, "state": joints}, max_skew, max_repeats)


def refused(found: Observed | Refusal, why: str, said: str = "") -> None:
    assert isinstance(found, Refusal), found
    assert found.cause == why
    assert said in found.reason
    assert found.stops == (why in {"missing", "stale", "conflict"})


def test_the_newest_of_each_is_an_observation_once() -> None:
    camera, joints, inputs = make()
    refused(inputs.observe(1.0), "missing")
    camera.offer("first", 1.0, 1.0)
    refused(inputs.observe(1.0), "missing", "'/joints'")
    joints.offer(state(a=3.0), 1.01, 1.01)
    camera.offer("second", 1.02, 1.02)
    found = inputs.observe(1.05)
    assert isinstance(found, Observed)
    assert (found.values["image"], found.values["state"]) == ("second", [3.0])
    assert (found.newest, found.oldest) == (1.02, 1.01)
    refused(inputs.observe(1.06), "repeated")
    joints.offer(state(a=4.0), 1.06, 1.06)
    assert isinstance(inputs.observe(1.07), Observed)
    inputs.clear()
    refused(inputs.observe(1.07), "missing")


def test_each_part_grows_old_by_itself() -> None:
    camera, joints, inputs = make(0.2, 1.0)
    camera.offer("x", 1.0, 1.0)
    for now in np.arange(1.0, 1.2, 0.01):
        joints.offer(state(a=1.0), now, now)
        assert isinstance(inputs.observe(now), Observed)
    joints.offer(state(a=1.0), 1.21, 1.21)
    refused(inputs.observe(1.21), "stale", "'/camera': the newest message is 0.210 s old")


def test_a_message_is_used_again_only_so_often_and_that_is_told() -> None:
    """A camera of 10 Hz beside joints of 30."""
    camera, joints, inputs = make(1.0, 1.0, max_repeats=1)
    for step in range(9):
        now = 1.0 + step / 30
        if step % 3 == 0:
            camera.offer("frame", now, now)
        joints.offer(state(a=1.0), now, now)
        found = inputs.observe(now)
        if step % 3 == 2:
            refused(found, "repeated", "'/camera'")
        else:
            assert isinstance(found, Observed)
            assert found.repeated == ("/camera",) * (step % 3)


def test_a_frame_that_a_driver_sends_twice_is_one() -> None:
    camera, joints, inputs = make(1.0, 1.0, max_repeats=0)
    for now in (1.0, 1.1):
        camera.offer("frame", 1.0, now)
        joints.offer(state(a=1.0), now, now)
        found = inputs.observe(now)
        assert isinstance(found, Observed) == (now == 1.0)


def test_parts_that_are_apart_are_no_observation() -> None:
    camera, joints, inputs = make(0.5, 0.1)
    camera.offer("x", 1.0, 1.3)
    joints.offer(state(a=1.0), 1.2, 1.3)
    refused(inputs.observe(1.3), "skewed")
    camera.offer("y", 1.15, 1.31)
    assert isinstance(inputs.observe(1.31), Observed)


def test_messages_that_are_old_or_out_of_order_are_dropped_and_it_is_said() -> None:
    camera, joints, inputs = make()
    joints.offer(state(a=1.0), 1.0, 1.0)
    camera.offer("an hour old", 1.0 - 3600, 1.0)
    refused(inputs.observe(1.0), "missing", "3600.000 s old when it came")
    camera.drop("its stamp is in the future")
    refused(inputs.observe(1.0), "missing", "in the future")
    camera.offer("good", 1.0, 1.0)
    camera.offer("late", 0.99, 1.0)
    found = inputs.observe(1.01)
    assert isinstance(found, Observed)
    assert found.values["image"] == "good"
    refused(inputs.observe(1.3), "stale", "out of order")


def test_the_newest_message_decides_even_if_it_is_wrong() -> None:
    camera, joints, inputs = make()
    camera.offer("x", 1.0, 1.0)
    joints.offer(state(a=1.0), 1.0, 1.0)
    assert isinstance(inputs.observe(1.0), Observed)
    joints.offer(state(a=float("nan")), 1.01, 1.01)
    refused(inputs.observe(1.02), "invalid", "'/joints'")
    joints.offer(state(a=2.0), 1.03, 1.03)
    assert isinstance(inputs.observe(1.03), Observed)


def test_two_publishers_are_a_conflict() -> None:
    assert conflicts({"/camera": 1, "/joints": 0, "/commands": 1}, ["/commands"]) == ""
    assert "'/camera' has 2 publishers" in conflicts({"/camera": 2, "/commands": 1}, ["/commands"])
    assert "another node sends commands" in conflicts({"/camera": 1, "/commands": 2}, ["/commands"])
    camera, joints, inputs = make()
    camera.offer("x", 1.0, 1.0)
    joints.offer(state(a=1.0), 1.0, 1.0)
    inputs.conflict = "'/camera' has 2 publishers"
    refused(inputs.observe(1.0), "conflict", "2 publishers")

"""A simulated robot, and the node as a process beside it."""

import array
import contextlib
import json
import os
import signal
import ssl  # noqa: F401 - before rclpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from vqbet_edge import EdgePolicy

BUNDLE = os.environ["VQBET_EDGE_TEST_BUNDLE"]
FULL = bool(os.environ.get("VQBET_EDGE_TORTURE"))
IMAGE, STATE, SIZE = "observation.image", "observation.state", 24
COMMANDS = {"array": Float64MultiArray, "trajectory": JointTrajectory, "joint_state": JointState}
NAME = "/vqbet_policy"
# Sooner than this nothing is called missing, later nothing late, on a machine that is busy.
SECONDS = 30.0

PARAMETERS: dict[str, Any] = {
    "bundle": BUNDLE, "backend": "onnxruntime", "seed": 7, "cameras.topics": ["/camera"],
    "state.topic": "/joints", "state.joints": ["x", "y"], "command.topic": "/commands",
    "command.when_stopped": "silence", "rate": 100.0, "autostart": True, "max_age": 5.0,
    "predict_within": -1.0, "max_skew": 0.002, "max_repeats": 1000, "timeout": 60.0, "resume_within": 60.0,
}  # fmt: skip

Observation = dict[str, np.ndarray]

_SLOW = """
import time
from vqbet_edge import EdgePolicy
act, calls = EdgePolicy.act, []
def slow(self, *arguments):
    calls.append(1)
    if len(calls) == {call}:
        print("predicting", flush=True)
        time.sleep(1.0)
    return act(self, *arguments)
EdgePolicy.act = slow
"""


def slow_call(number: int) -> str:
    """What the node runs first: its call `number` of `act` says so, and takes a second."""
    return _SLOW.format(call=number)


def observations(count: int, seed: int = 0) -> list[Observation]:
    random = np.random.default_rng(seed)
    return [
        {
            IMAGE: random.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
            STATE: random.uniform([-2, 10], [2, 50]).astype(np.float32),
        }
        for _ in range(count)
    ]


def expected(seen: list[Observation], seed: int = 7) -> list[list[float]]:
    """What the policy does in this process."""
    with EdgePolicy.load(BUNDLE, "onnxruntime", seed=seed) as policy:
        return [policy.act(observation).tolist() for observation in seen]


def wait(until: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What it says once that is true."""
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, f"not within {seconds} s: {until}"
        time.sleep(0.002)
    return found


def image_message(frame: np.ndarray, encoding: str = "rgb8", padding: int = 0) -> Any:
    rows = (frame if encoding == "rgb8" else frame[..., ::-1]).reshape(len(frame), -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    return Image(height=frame.shape[0], width=frame.shape[1], encoding=encoding,
                 step=rows.shape[1], data=array.array("B", rows.tobytes()))  # fmt: skip


def joint_message(state: np.ndarray, names: tuple[str, ...] = ("x", "y")) -> Any:
    values = {"x": float(state[0]), "y": float(state[1])}
    return JointState(name=list(names), position=[values.get(name, 1e9) for name in names])


class Simulator:
    """Publishes observations, and keeps what comes back."""

    def __init__(self, command: str = "array", camera: str = "/camera") -> None:
        self.node = rclpy.create_node("simulator")
        self.commands: list[Any] = []
        self.diagnostics: list[Any] = []
        self._clients: dict[str, Any] = {}
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._ended = threading.Event()
        kind = CompressedImage if camera.endswith("/compressed") else Image
        self.images = self.node.create_publisher(kind, camera, 1)
        self.joints = self.node.create_publisher(JointState, "/joints", 1)
        deep = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
        self.node.create_subscription(COMMANDS[command], "/commands", self.commands.append, deep)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, 10)
        self._thread = threading.Thread(target=self._spin)
        self._thread.start()

    def _spin(self) -> None:
        while not self._ended.is_set():
            self._executor.spin_once(timeout_sec=0.05)

    def hear(self, kind: Any, topic: str, *, latched: bool = False) -> list[Any]:
        """What a topic says from here on."""
        heard: list[Any] = []
        qos = QoSProfile(depth=100)
        if latched:
            qos.durability = DurabilityPolicy.TRANSIENT_LOCAL
        self.node.create_subscription(kind, topic, heard.append, qos)
        return heard

    def now(self) -> int:
        """The clock of headers, in nanoseconds."""
        return int(self.node.get_clock().now().nanoseconds)

    def publish(self, image: Any = None, joints: Any = None, stamp: int | None = None) -> None:
        """Publish messages with one stamp: now, another one, or 0 for none."""
        stamp = self.now() if stamp is None else stamp
        for message, publisher in ((image, self.images), (joints, self.joints)):
            if message is not None:
                message.header.stamp = Time(nanoseconds=stamp).to_msg()
                publisher.publish(message)

    def show(self, observation: Observation, stamp: int | None = None) -> None:
        """Publish an observation."""
        self.publish(image_message(observation[IMAGE]), joint_message(observation[STATE]), stamp)

    def act(self, observation: Observation) -> Any:
        """Publish an observation until there is a command, which it is."""
        return self.answer(lambda: self.show(observation))

    def answer(self, publish: Callable[[], None]) -> Any:
        """The command that follows a publication, which is repeated should it get lost."""
        before = len(self.commands)
        for _ in range(10):
            publish()
            with contextlib.suppress(AssertionError):
                return wait(lambda: self.commands[before:], SECONDS / 10)[0]
        raise AssertionError(f"no command came; {self.said()}")

    def stands(self, seconds: float = 0.3) -> None:
        """No command comes, whatever is published."""
        before, end = len(self.commands), time.monotonic() + seconds
        while time.monotonic() < end:
            self.show(observations(1)[0])
            time.sleep(0.02)
        assert len(self.commands) == before

    def said(self) -> Any:
        """Text and values of the latest diagnostics."""
        if not self.diagnostics:
            return "", {}
        status = self.diagnostics[-1].status[0]
        return status.message, {each.key: each.value for each in status.values}

    def call(self, kind: Any, service: str, **request: Any) -> Any:
        """The response of a service."""
        if service not in self._clients:
            self._clients[service] = self.node.create_client(kind, f"{NAME}/{service}")
        client = self._clients[service]
        assert client.wait_for_service(SECONDS)
        # The response gets lost where the server has not found the client yet.
        for _ in range(10):
            future = client.call_async(kind.Request(**request))
            with contextlib.suppress(AssertionError):
                wait(future.done, SECONDS / 10)
                return future.result()
        raise AssertionError(f"no response of {service}")

    def enable(self, enabled: bool) -> Any:
        return self.call(SetBool, "enable", data=enabled)

    def reset(self) -> Any:
        return self.call(Trigger, "reset")

    def state(self) -> str:
        return str(self.call(GetState, "get_state").current_state.label)

    def change(self, transition: int) -> bool:
        request = ChangeState.Request()
        request.transition.id = transition
        return bool(self.call(ChangeState, "change_state", transition=request.transition).success)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self.node.destroy_node()


def write_parameters(folder: Path, changed: dict[str, Any]) -> Path:
    """A file that ROS reads; JSON is YAML."""
    path = folder / "parameters.yaml"
    given = {name: value for name, value in (PARAMETERS | changed).items() if value is not None}
    path.write_text(json.dumps({"/**": {"ros__parameters": given}}))
    return path


class Process:
    """The node, in a process of its own; `before` is run first in there."""

    def __init__(self, parameters: Path, before: str = "", remap: str = "") -> None:
        code = f"{before}\nfrom vqbet_edge_ros.main import main\nmain()"
        self.output = parameters.with_suffix(".log")
        command = [sys.executable, "-u", "-c", code, "--ros-args", "--params-file", parameters]
        with self.output.open("w") as output:
            self._process = subprocess.Popen(
                [*command, *(["-r", remap] if remap else [])], stdout=output, stderr=output
            )

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str) -> None:
        """Until it was printed."""
        wait(lambda: text in self.text() or self._process.poll() is not None)
        assert text in self.text(), self.text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """The exit code, once it has ended."""
        try:
            return self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


@pytest.fixture(scope="session", autouse=True)
def ros() -> Iterator[None]:
    rclpy.init()
    yield
    rclpy.shutdown()


@pytest.fixture
def robot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["Robot"]:
    """`@pytest.mark.parametrize("robot", [{...}], indirect=True)` changes parameters."""
    robot = Robot(tmp_path, getattr(request, "param", {}))
    try:
        robot.ready()
        yield robot
    finally:
        robot.close()


class Robot:
    """A simulator and a node that talk to each other."""

    def __init__(self, folder: Path, changed: dict[str, Any]) -> None:
        changed = dict(changed)
        before, remap = changed.pop("before", ""), changed.pop("remap", "")
        given = PARAMETERS | changed
        camera = remap.partition(":=")[2] or given["cameras.topics"][0]
        self.simulator = Simulator(given.get("command.type", "array"), camera)
        self.process = Process(write_parameters(folder, changed), before, remap)

    def ready(self) -> None:
        """Wait until they have found each other, and the node is active."""
        simulator = self.simulator
        try:
            wait(simulator.images.get_subscription_count)
            wait(simulator.joints.get_subscription_count)
            wait(lambda: simulator.node.count_publishers("/commands"))
            wait(lambda: "waiting for" in simulator.said()[0])
        except AssertionError as error:
            raise AssertionError(self.process.text()) from error

    def close(self) -> None:
        self.process.end()
        self.simulator.close()

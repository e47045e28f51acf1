"""How evenly a node sends commands: a simulator and the node, in two processes.

python integrations/ros2/measure.py pusht-fp16.bundle --minutes 10

The simulator publishes random frames at the control rate and joint states at 100 Hz, and notes when
commands come. Where rclpy comes from wheels (`tests/ros2`), run it with that environment's Python
and PYTHONPATH=.:integrations/ros2; on a robot, source ROS first. Nothing else may run meanwhile.
"""

import argparse
import json
import signal
import ssl  # noqa: F401 - before rclpy
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray
from vqbet_edge_ros import messages

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Manifest

JOINT_HZ = 100.0
PERCENTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}


class Simulator:
    """Publishes frames and joint states, each on a thread, and notes what comes back."""

    def __init__(self, manifest: Manifest, rate: float) -> None:
        self.node = rclpy.create_node("measure")
        self.arrived: list[float] = []
        self.statuses: list[dict[str, str]] = []
        self.node.create_subscription(Float64MultiArray, "/commands", self._command, 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._status, 10)
        random, shapes = np.random.default_rng(0), manifest.image_shapes.values()
        stamp = self.node.get_clock().now().to_msg()
        frames = [
            [messages.image(random.integers(0, 256, shape, np.uint8), stamp) for shape in shapes]
            for _ in range(8)
        ]
        names = [f"j{number}" for number in range(manifest.state_dim)]
        states = [
            [JointState(name=names, position=[np.sin(number / 50)] * len(names))]
            for number in range(315)
        ]
        cameras = [
            self.node.create_publisher(Image, f"/camera_{number}", 1)
            for number in range(len(frames[0]))
        ]
        state = self.node.create_publisher(JointState, "/joints", 1)
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._publish, args=(rate, frames, cameras)),
            threading.Thread(target=self._publish, args=(JOINT_HZ, states, [state])),
            threading.Thread(target=self._spin),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.node.destroy_node()

    def _command(self, _: Any) -> None:
        self.arrived.append(time.monotonic())

    def _status(self, message: Any) -> None:
        self.statuses.append({each.key: each.value for each in message.status[0].values})

    def _publish(self, rate: float, cycle: list[list[Any]], publishers: list[Any]) -> None:
        due, number = time.monotonic(), 0
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            stamp = self.node.get_clock().now().to_msg()
            for message, publisher in zip(cycle[number % len(cycle)], publishers, strict=True):
                message.header.stamp = stamp
                publisher.publish(message)
            due, number = due + 1 / rate, number + 1

    def _spin(self) -> None:
        executor = SingleThreadedExecutor()
        executor.add_node(self.node)
        while not self._ended.is_set():
            executor.spin_once(timeout_sec=0.1)


def report(simulator: Simulator, rate: float) -> str:
    """The figures, as Markdown."""
    arrived = np.array(simulator.arrived)
    count, seconds = len(arrived), arrived[-1] - arrived[0]
    figures = np.percentile(np.diff(arrived) * 1e3, [*PERCENTILES.values()])
    lines = [
        f"{count} commands in {seconds:.1f} s at {rate:g} Hz (a period of {1e3 / rate:.2f} ms)",
        "",
        "| ms | " + " | ".join(PERCENTILES) + " |",
        "|---|" + "---|" * len(PERCENTILES),
        "| between commands, at the receiver | " + " | ".join(f"{f:.2f}" for f in figures) + " |",
    ]
    for name, what in {"act_ms": "`act`", "age_ms": "oldest part of the observation"}.items():
        row = []
        for each in PERCENTILES:
            found = [float(s[key]) for s in simulator.statuses if (key := f"{name}_{each}") in s]
            row.append(f"{max(found):.2f}" if found else "")
        lines.append(f"| {what}, worst 300 steps | " + " | ".join(row) + " |")
    counts = {name: v for name, v in simulator.statuses[-1].items() if "_ms_" not in name}
    return "\n".join([*lines, "", f"counts: {counts}"])


def main() -> None:
    """Run both, and say what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", help="a directory or a Hub id")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=30.0)
    given = parser.parse_args()
    bundle = Bundle.open(given.bundle)
    manifest = bundle.manifest
    parameters = {
        "bundle": str(bundle.path.resolve()),
        "rate": given.rate,
        "predict_within": -1.0,  # how long it takes is what is measured
        "autostart": True,
        "cameras.keys": list(manifest.image_keys),
        "cameras.topics": [f"/camera_{number}" for number in range(len(manifest.image_keys))],
        "state.topic": "/joints",
        "state.joints": [f"j{number}" for number in range(manifest.state_dim)],
        "command.joints": [f"a{number}" for number in range(manifest.action_dim)],
        "command.topic": "/commands",
        "command.when_stopped": "hold",
    }
    rclpy.init()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "parameters.yaml"
        file.write_text(json.dumps({"/**": {"ros__parameters": parameters}}))
        command = [sys.executable, "-m", "vqbet_edge_ros", "--ros-args", "--params-file", str(file)]
        node = subprocess.Popen(command)  # noqa: S603
        simulator = Simulator(manifest, given.rate)
        try:
            while not simulator.arrived and node.poll() is None:
                time.sleep(0.1)
            time.sleep(60 * given.minutes)
        finally:
            node.send_signal(signal.SIGTERM)
            node.wait()
            simulator.stop()
            rclpy.shutdown()
    sys.stdout.write(report(simulator, given.rate) + "\n")


if __name__ == "__main__":
    main()

"""`ros2 run vqbet_edge_ros policy`, `python -m vqbet_edge_ros`."""

import logging
import os
import select
import signal
import ssl  # noqa: F401 - before rclpy, which brings another libcrypto
import sys
import threading

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions

from vqbet_edge_ros.node import PolicyNode

_LOG = logging.getLogger(__name__)
# What a step or a bundle that is being loaded may take to end; then the process ends without them.
_PATIENCE_S = 5.0


def main(arguments: list[str] | None = None) -> None:
    """Spin until SIGTERM or SIGINT: commands stop first, then the rest ends."""
    signals, ending = _Signals(), threading.Event()
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    node = PolicyNode()
    spinning = threading.Thread(
        target=_spin, args=(node, ending, signals), name="vqbet-ros", daemon=True
    )
    spinning.start()
    number = signals.wait()
    node.stop(f"signal {number}")
    ending.set()
    spinning.join(_PATIENCE_S)
    if spinning.is_alive():
        _LOG.error("a step did not end within %s s; the process ends without it", _PATIENCE_S)
        sys.stderr.flush()
        os._exit(1)
    rclpy.shutdown()
    if number == 0:
        sys.exit(1)


class _Signals:
    """Waits for signals, without doing anything in their handlers.

    A handler runs between any two instructions of the main thread, which may hold the very lock
    that stopping the robot takes; so the main thread does nothing but wait.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)

    def wait(self) -> int:
        """The number of the first signal, 0 if spinning ended by itself."""
        select.select([self._read], [], [])
        return os.read(self._read, 1)[0]

    def end(self) -> None:
        """Spinning ended."""
        os.write(self._write, b"\0")


def _spin(node: PolicyNode, ending: threading.Event, signals: _Signals) -> None:
    try:
        if node.get_parameter("autostart").value:
            for step in (node.trigger_configure, node.trigger_activate):
                if step() != TransitionCallbackReturn.SUCCESS:
                    return  # whoever started the process sees that it ended
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while not ending.is_set():
            _spin_once(executor)
    finally:
        node.destroy_node()
        signals.end()


def _spin_once(executor: SingleThreadedExecutor) -> None:
    try:
        executor.spin_once(timeout_sec=0.1)
    except Exception:  # noqa: BLE001 - it is logged, and the watchdog goes on
        _LOG.exception("a callback failed; the node spins on")

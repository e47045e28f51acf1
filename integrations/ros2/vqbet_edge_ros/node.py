"""The lifecycle node."""

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

from vqbet_edge import UsageError, VQBeTEdgeError
from vqbet_edge_ros.parameters import Parameters, check_names, defaults, parse
from vqbet_edge_ros.resources import Resources


class PolicyNode(LifecycleNode):  # type: ignore[misc]  # rclpy has no types
    """Drives a robot with a bundle, from camera and joint topics.

    configure loads the bundle and subscribes, activate begins an episode, deactivate stops, cleanup
    frees. What fails while active deactivates.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("vqbet_policy", **options)
        self._resources: Resources | None = None
        self._ended = threading.Event()
        self._logs = _ToRos(self.get_logger())
        logging.getLogger("vqbet_edge").addHandler(self._logs)
        logging.getLogger("vqbet_edge_ros").addHandler(self._logs)
        self._declare(defaults())
        self.add_on_set_parameters_callback(self._on_parameters)

    def stop(self, reason: str) -> None:
        """Commands stop for good before this returns; any thread may call it."""
        self._ended.set()
        resources = self._resources
        try:
            if resources is not None:
                resources.watchdog.close(reason)
        except Exception as error:  # noqa: BLE001 - it is closed all the same
            self.get_logger().error(f"while stopping: {type(error).__name__}: {error}")

    def on_configure(self, _: Any) -> TransitionCallbackReturn:
        """Load, check, prove, subscribe."""
        try:
            self._resources = Resources(self, self._read_parameters())
        except Exception as error:  # noqa: BLE001 - rclpy would swallow it
            traced = "" if isinstance(error, VQBeTEdgeError) else f"\n{traceback.format_exc()}"
            self.get_logger().error(f"cannot be configured: {error}{traced}")
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, _: Any) -> TransitionCallbackReturn:
        """Begin an episode."""
        assert self._resources is not None  # noqa: S101 - the state machine's promise
        try:
            self._resources.start(self._ended)
        except Exception as error:  # noqa: BLE001
            self.get_logger().error(f"cannot be activated: {error}\n{traceback.format_exc()}")
            return TransitionCallbackReturn.FAILURE
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, _: Any) -> TransitionCallbackReturn:
        """Stop."""
        return self._finish(lambda resources: resources.halt("deactivated"))

    def on_cleanup(self, _: Any) -> TransitionCallbackReturn:
        """Stop and free; the node can be configured again."""
        return self._finish(Resources.free, forget=True)

    on_shutdown = on_error = on_cleanup

    def destroy_node(self) -> None:
        """Stop and free."""
        self._finish(Resources.free, forget=True)
        for name in ("vqbet_edge", "vqbet_edge_ros"):
            logging.getLogger(name).removeHandler(self._logs)
        super().destroy_node()

    def _finish(
        self, end: Callable[[Resources], None], *, forget: bool = False
    ) -> TransitionCallbackReturn:
        resources = self._resources
        if forget:
            self._resources = None
        try:
            if resources is not None:
                end(resources)
        except Exception as error:  # noqa: BLE001 - the state changes all the same
            self.get_logger().error(f"while stopping: {type(error).__name__}: {error}")
        return TransitionCallbackReturn.SUCCESS

    def _declare(self, wanted: dict[str, Any]) -> None:
        # An empty list has no type, and a whole number may stand for a real one.
        free = ParameterDescriptor(dynamic_typing=True)
        for name, default in wanted.items():
            if not self.has_parameter(name):
                self.declare_parameter(name, default, free)

    def _read_parameters(self) -> Parameters:
        # rclpy shows the names that nobody declared nowhere else.
        overrides = dict.fromkeys(getattr(self, "_parameter_overrides", ()))
        ours = {name: None for name in overrides if not name.startswith(("use_sim_time", "qos_"))}
        parts = {name: self.get_parameter(name).value for name in ("state.parts", "command.parts")}
        check_names(ours | parts)
        wanted = defaults(parts)
        self._declare(wanted)
        parameters = parse({name: self.get_parameter(name).value for name in wanted})
        if self.get_parameter("use_sim_time").value and parameters.stamps == "header":
            raise UsageError(
                "simulated time does not pass as time.monotonic() does; with use_sim_time set the "
                "parameter stamps to 'receive'"
            )
        return parameters

    def _on_parameters(self, changed: list[Any]) -> SetParametersResult:
        groups = {name.partition(".")[0] for name in defaults()}
        ours = [each.name for each in changed if each.name.partition(".")[0] in groups]
        if self._resources is None or not ours:
            return SetParametersResult(successful=True)
        return SetParametersResult(
            successful=False, reason=f"{ours} are read by configure: call cleanup first"
        )


class _ToRos(logging.Handler):
    """What the packages log goes to ROS's log."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        levels = {logging.ERROR: "error", logging.WARNING: "warning", 0: "info"}
        level = next(name for lowest, name in levels.items() if record.levelno >= lowest)
        getattr(self._logger, level)(record.getMessage())

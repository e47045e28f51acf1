"""What a configured node holds: policy, topics, services, timers."""

import functools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger

from vqbet_edge import EdgePolicy, StaleObservationError, VQBeTEdgeError
from vqbet_edge_ros import __version__, messages
from vqbet_edge_ros.clock import StampClock
from vqbet_edge_ros.control import Loop, Step
from vqbet_edge_ros.diagnostics import ERROR, LEVELS
from vqbet_edge_ros.inputs import Input, Refusal, conflicts
from vqbet_edge_ros.joints import Values
from vqbet_edge_ros.loading import assemble, load_policy
from vqbet_edge_ros.parameters import Parameters
from vqbet_edge_ros.parts import CommandPart
from vqbet_edge_ros.watchdog import Mode

# The newest is all that counts; a camera's frame that got lost is not sent again.
_SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
_LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# How long a step may take to end when the node is deactivated.
_PATIENCE_S = 10.0
# How long somebody may take to acknowledge a command, and between those that nobody will.
_ACKNOWLEDGE_S, _SETTLE_S = 0.1, 0.01


class Resources:
    """All that exists from configure to cleanup."""

    def __init__(self, node: LifecycleNode, parameters: Parameters) -> None:
        self._node, self._parameters = node, parameters
        self._loop: Loop | None = None
        self._made: list[tuple[Callable[[Any], Any], Any]] = []
        # The node's own group would remember everything that was ever in it.
        self._group = MutuallyExclusiveCallbackGroup()
        self._policy = load_policy(parameters)
        try:
            self._assemble()
        except BaseException:
            self.free()
            raise

    def _assemble(self) -> None:
        given, policy = self._parameters, self._policy
        made = assemble(given, policy, self._publish_command, self._acknowledged, self._sent)
        self._rate, self._statistics = made.rate, made.statistics
        self._command_names = [name for part in made.command for name in part.joints.names]
        self._state_names = [name for part in made.state for name in part.given.joints]
        self._topics, self._inputs = made.topics, made.inputs
        self._controller, self.watchdog = made.controller, made.watchdog
        self._stamps = StampClock(given.max_skew)
        self._advertise()
        self._subscribe()
        self._timer(1 / self._rate, self._watch)
        self._timer(0.1, self._look_for_conflicts)
        self._timer(1.0, self._diagnose)
        described = json.dumps(_describe(policy, given, self._rate))
        self._metadata.publish(String(data=described))

    # Publishers, subscriptions, services and timers are made through these, so that none is left.

    def _publisher(self, kind: Any, topic: str, qos: Any = 1) -> Any:
        made = self._node.create_publisher(kind, topic, qos, callback_group=self._group)
        self._made.append((self._node.destroy_publisher, made))
        return made

    def _subscription(self, kind: Any, topic: str, callback: Callable[[Any], None]) -> None:
        made = self._node.create_subscription(
            kind, topic, self._contained(callback), _SENSOR, callback_group=self._group
        )
        self._made.append((self._node.destroy_subscription, made))

    def _service(self, kind: Any, name: str, callback: Callable[[Any, Any], Any]) -> None:
        made = self._node.create_service(
            kind, name, self._contained(callback), callback_group=self._group
        )
        self._made.append((self._node.destroy_service, made))

    def _timer(self, period: float, callback: Callable[[], None]) -> None:
        # The node's own clock may be set, and timers with it.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        made = self._node.create_timer(
            period, self._contained(callback), callback_group=self._group, clock=clock
        )
        self._made.append((self._node.destroy_timer, made))

    def _contained(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """What it raises stops the robot, and does not escape through spin."""

        @functools.wraps(callback)
        def call(*arguments: Any) -> Any:
            try:
                return callback(*arguments)
            except Exception as error:  # noqa: BLE001
                self._fail(error)
                return arguments[-1] if arguments else None  # of a service, the response

        return call

    def _advertise(self) -> None:
        given, manifest = self._parameters, self._policy.manifest
        self._commands = {
            each.topic: self._publisher(messages.COMMANDS[each.type], each.topic)
            for each in given.commands.values()
        }
        self._diagnostics = self._publisher(DiagnosticArray, "/diagnostics", 10)
        self._decisions = self._publisher(String, "~/decision", 10)
        self._metadata = self._publisher(String, "~/metadata", _LATCHED)
        self._frames = {
            key: self._publisher(Image, f"~/replay/image_{number}", 10)
            for number, key in enumerate(manifest.image_keys)
        }
        self._states = self._publisher(JointState, "~/replay/state", 10)
        self._actions = self._publisher(JointState, "~/replay/action", 10)

    def _subscribe(self) -> None:
        given = self._parameters
        for each in self._topics.values():
            kind = messages.INPUTS[each.kind]
            self._subscription(kind, each.name, functools.partial(self._received, each))
        if given.teleop.topic:
            self._subscription(Float64MultiArray, given.teleop.topic, self._teleoperated)
        self._service(Trigger, "~/reset", self._on_reset)
        self._service(SetBool, "~/enable", self._on_enable)

    def start(self, ended: threading.Event) -> None:
        """Begin an episode, unless the process is about to end."""
        self._inputs.clear()
        self._policy.reset()
        self._look_for_conflicts()
        self.watchdog.open(time.monotonic())
        if ended.is_set():
            self.watchdog.close("the process ends")
        clock = self._node.get_clock()
        simulated = self._node.get_parameter("use_sim_time").value
        seconds = (lambda: float(clock.now().nanoseconds / 1e9)) if simulated else None
        self._loop = Loop(self._controller.tick, self._rate, seconds)
        self._loop.start()

    def halt(self, reason: str) -> None:
        """Commands stop first; then the step under way ends."""
        self.watchdog.close(reason)
        loop, self._loop = self._loop, None
        if loop is not None and not loop.stop(_PATIENCE_S):
            raise VQBeTEdgeError(f"the policy still works on a step after {_PATIENCE_S} s")

    def free(self) -> None:
        """Stop, and give everything back."""
        try:
            if hasattr(self, "watchdog"):
                self.halt("cleaned up")
        finally:
            for destroy, made in reversed(self._made):
                destroy(made)
            self._made.clear()
            self._policy.close()

    def _received(self, each: Input, message: Any) -> None:
        now, header = time.monotonic(), message.header.stamp
        stamp = header.sec * 10**9 + header.nanosec
        if self._parameters.stamps == "receive" or stamp == 0:
            each.offer(message, now, now)
            return
        try:
            taken = self._stamps.place(stamp, self._node.get_clock().now().nanoseconds, now)
        except StaleObservationError as error:
            each.drop(str(error))
        else:
            each.offer(message, taken, now)

    def _teleoperated(self, message: Any) -> None:
        try:
            self.watchdog.teleoperate(np.array(message.data, np.float64), time.monotonic())
        except VQBeTEdgeError as error:
            self._statistics.count("teleop_refused")
            self._log().warning(str(error), throttle_duration_sec=1.0)

    def _on_reset(self, _: Any, response: Any) -> Any:
        response.success = self.watchdog.request_reset()
        response.message = "with the next observation" if response.success else "not active"
        return response

    def _on_enable(self, request: Any, response: Any) -> Any:
        self._look_for_conflicts()
        conflict = self._inputs.conflict if request.data else ""
        done = not conflict and self.watchdog.enable(request.data, time.monotonic())
        response.success, response.message = done, conflict or self.watchdog.mode.value
        return response

    def _watch(self) -> None:
        now = time.monotonic()
        self._stamps.compare(self._node.get_clock().now().nanoseconds, now)
        if self._loop is not None and self._loop.failure is not None:
            self._fail(self._loop.failure)
        self.watchdog.watch(now)

    def _look_for_conflicts(self) -> None:
        topics = [each.name for each in self._topics.values()]
        counts = {
            name: self._node.count_publishers(self._node.resolve_topic_name(name))
            for name in (*topics, *self._commands)
        }
        self._inputs.conflict = conflicts(counts, self._commands)
        if self._inputs.conflict:
            self.watchdog.refuse(Refusal("conflict", self._inputs.conflict), time.monotonic())

    def _fail(self, error: Exception) -> None:
        """Commands stop, and the node becomes inactive."""
        reason = f"failed: {type(error).__name__}: {error}"
        self.watchdog.close(reason)
        self._log().error(reason)
        if self._loop is not None:
            self._node.trigger_deactivate()

    def _publish_command(self, part: CommandPart, rows: Values) -> None:
        period, names = 1 / self._rate, part.joints.names
        made = messages.command(part.given.type, names, rows, period, self._now())
        self._commands[part.given.topic].publish(made)

    def _acknowledged(self, part: CommandPart) -> bool:
        """Whether all who listen have the latest command; who takes best effort never says so."""
        publisher = self._commands[part.given.topic]
        found = self._node.get_subscriptions_info_by_topic(publisher.topic_name)
        if any(each.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT for each in found):
            time.sleep(_SETTLE_S)
            return False
        return bool(publisher.wait_for_all_acked(Duration(seconds=_ACKNOWLEDGE_S)))

    def _sent(self, step: Step) -> None:
        """Show what was done to those who want to see it."""
        stamp, manifest = self._now(), self._policy.manifest
        made = self._policy.last
        if step.decided and made is not None:
            self._decisions.publish(messages.decision(made, stamp))
        for key, publisher in self._frames.items():
            if publisher.get_subscription_count():
                publisher.publish(messages.image(step.observation[key], stamp))
        if self._states.get_subscription_count():
            values = step.observation[manifest.state_key]
            self._states.publish(messages.joint_state(self._state_names, values, stamp))
        if self._actions.get_subscription_count():
            self._actions.publish(messages.joint_state(self._command_names, step.action, stamp))

    def _diagnose(self) -> None:
        mode, reason, counts = self.watchdog.mode, self.watchdog.reason, self._policy.guard_counts
        limits = self._policy.action_limits
        failed = mode is Mode.CLOSED and reason.startswith("failed")
        values = self._statistics.summary() | {
            f"guards.{name}": str(count) for name, count in counts._asdict().items()
        }
        if limits is not None:
            for end, numbers in zip(("lowest", "highest"), limits, strict=True):
                values[f"guards.{end}"] = str([float(f"{number:.6g}") for number in numbers])
        text = f"{mode.value}: {reason}" if reason else mode.value
        how = ERROR if failed else LEVELS[mode]
        name = self._node.get_fully_qualified_name()
        self._diagnostics.publish(messages.diagnostics(name, how, text, values, self._now()))
        if mode in {Mode.STARTING, Mode.STOPPED, Mode.WAITING}:
            self._log().warning(text, throttle_duration_sec=5.0)

    def _now(self) -> Any:
        return self._node.get_clock().now().to_msg()

    def _log(self) -> Any:
        return self._node.get_logger()


def _describe(policy: EdgePolicy, parameters: Parameters, rate: float) -> dict[str, Any]:
    """What `~/metadata` says for as long as the node is configured."""
    manifest = policy.manifest
    return {
        "vqbet_edge_ros": __version__,
        "bundle": parameters.bundle,
        "manifest_sha256": manifest.manifest_sha256,
        "checkpoint": manifest.source.name,
        "checkpoint_sha256": manifest.source.sha256,
        "backend": policy.backend_name,
        "seed": parameters.seed,
        "rate": rate,
        "fps": policy.fps,
        "cameras": {key: list(shape) for key, shape in manifest.image_shapes.items()},
        "state_dim": manifest.state_dim,
        "action_dim": manifest.action_dim,
        "n_obs_steps": manifest.policy.n_obs_steps,
        "action_chunk_size": manifest.policy.action_chunk_size,
    }

"""From actions to what is sent."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vqbet_edge_ros.joints import Joints, Values
from vqbet_edge_ros.parameters import CommandType, WhenStopped

# So often is the last word said, if nobody acknowledges it.
_TIMES = 3


class Output:
    """Sends commands to one topic, and what stands for them while the policy is stopped.

    Args:
        joints: names and units of the commands.
        kind: `trajectory` sends every new chunk once, the others one action per step.
        when_stopped: `hold` sends the last command again, `zero` zeros, `silence` nothing.
        publish: gets float64 (n, J) in ROS's units; n is 1 for all but a trajectory.
        acknowledged: waits a moment, and says whether all who listen have what was published.
    """

    def __init__(
        self,
        joints: Joints,
        kind: CommandType,
        when_stopped: WhenStopped,
        publish: Callable[[Values], None],
        acknowledged: Callable[[], bool],
    ) -> None:
        self._joints, self._kind, self._when_stopped = joints, kind, when_stopped
        self.publish, self.acknowledged = publish, acknowledged
        self.clear()

    @property
    def width(self) -> int:
        """Numbers of a command."""
        return len(self._joints.names)

    @property
    def last(self) -> Values | None:
        """The latest command (J,) in ROS's units, until it is forgotten."""
        return self._last

    def clear(self) -> None:
        """Forget the last command: by the next one, others may have moved the robot elsewhere."""
        self._last: Values | None = None
        self._sent_chunk: NDArray[np.float32] | None = None
        self._moving = False

    def command(self, action: NDArray[np.float32], upcoming: NDArray[np.float32]) -> None:
        """Send an action (A,), or of a trajectory the rest of the chunk (n, A), itself included."""
        self._last = self._joints.to_ros(action)
        self._moving = True
        if self._kind != "trajectory":
            self.publish(self._last[None])
            return
        before, self._sent_chunk = self._sent_chunk, upcoming
        if before is None or not np.array_equal(before[1:], upcoming):
            self.publish(self._joints.to_ros(upcoming))

    def forward(self, values: Values) -> None:
        """Send an operator's command (J,), in ROS's units."""
        self._last, self._sent_chunk, self._moving = values, None, True
        self.publish(values[None])

    def stand(self) -> None:
        """Send what keeps the robot where it is."""
        standing = self._standing()
        if standing is not None:
            self.publish(standing[None])

    def last_word(self, *, alone: bool = True) -> Values | None:
        """What keeps the robot where it is (1, J), to be sent for the last time, if anything.

        Args:
            alone: nobody else sends commands; otherwise a position, which the robot has been told
                and may have left, is not sent again.
        """
        standing = self._standing()
        told = self._when_stopped == "hold" and self._kind != "trajectory"
        return None if standing is None or (told and not alone) else standing[None]

    def _standing(self) -> Values | None:
        first, self._moving, self._sent_chunk = self._moving, False, None
        match self._when_stopped:
            case "zero":
                self._last = np.zeros(len(self._joints.names))
                return self._last
            # A trajectory's one point is where it should be by now, in place of the rest.
            case "hold" if first or self._kind != "trajectory":
                return self._last
        return None


class Outputs:
    """The parts of a robot's command, one behind the other: an arm, a gripper, a base.

    One that fails keeps no other from being told to stop.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = list(outputs)
        ends = np.cumsum([each.width for each in outputs])
        self._places = [slice(end - o.width, end) for o, end in zip(outputs, ends, strict=True)]
        self.width = int(ends[-1])

    @property
    def last(self) -> Values | None:
        """The latest command (A,) in ROS's units, until it is forgotten."""
        last = [each.last for each in self._outputs if each.last is not None]
        return np.concatenate(last) if len(last) == len(self._outputs) else None

    def clear(self) -> None:
        """See `Output.clear`."""
        for each in self._outputs:
            each.clear()

    def command(self, action: NDArray[np.float32], upcoming: NDArray[np.float32]) -> None:
        """Send an action (A,) of the chunk (n, A); see `Output.command`."""
        for each, place in zip(self._outputs, self._places, strict=True):
            each.command(action[place], upcoming[:, place])

    def forward(self, values: Values) -> None:
        """Send an operator's command (A,), in ROS's units."""
        for each, place in zip(self._outputs, self._places, strict=True):
            each.forward(values[place])

    def stand(self) -> None:
        """Send what keeps the robot where it is."""
        _tell(each.stand for each in self._outputs)

    def end(self, *, alone: bool = True) -> None:
        """Send it for the last time, until it is acknowledged; `alone` as of `Output.last_word`."""
        words = {each: each.last_word(alone=alone) for each in self._outputs}
        left = {each: rows for each, rows in words.items() if rows is not None}
        for _ in range(_TIMES):
            # All are told before anybody is waited for.
            _tell(partial(each.publish, rows) for each, rows in left.items())
            left = {each: rows for each, rows in left.items() if not each.acknowledged()}


def _tell(calls: Iterable[Callable[[], None]]) -> None:
    failed: Exception | None = None
    for call in calls:
        try:
            call()
        except Exception as error:  # noqa: BLE001, PERF203 - the others are told first
            failed = error
    if failed is not None:
        raise failed

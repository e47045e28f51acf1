"""From actions to what is sent."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vqbet_edge_ros.joints import Joints, Values
from vqbet_edge_ros.parameters import CommandType, WhenStopped

# So often is the last word said, if nobody acknowledges it.
_TIMES = 3


class Output:
    """Sends commands, and what stands for them while the policy is stopped.

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
        self._publish, self._acknowledged = publish, acknowledged
        self.clear()

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
            self._publish(self._last[None])
            return
        before, self._sent_chunk = self._sent_chunk, upcoming
        if before is None or not np.array_equal(before[1:], upcoming):
            self._publish(self._joints.to_ros(upcoming))

    def forward(self, values: Values) -> None:
        """Send an operator's command (J,), in ROS's units."""
        self._last, self._sent_chunk, self._moving = values, None, True
        self._publish(values[None])

    def stand(self) -> None:
        """Send what keeps the robot where it is."""
        standing = self._standing()
        if standing is not None:
            self._publish(standing[None])

    def end(self, *, alone: bool = True) -> None:
        """Send it for the last time, until it is acknowledged.

        Args:
            alone: nobody else sends commands; otherwise a position, which the robot has been told
                and may have left, is not sent again.
        """
        standing = self._standing()
        told = self._when_stopped == "hold" and self._kind != "trajectory"
        if standing is None or (told and not alone):
            return
        for _ in range(_TIMES):
            self._publish(standing[None])
            if self._acknowledged():
                return

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

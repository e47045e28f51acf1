"""Two processes: the node is told to end, or ends by itself."""

import signal
import time
from pathlib import Path

import pytest
from rclpy.qos import QoSProfile, ReliabilityPolicy
from robots import (
    Process,
    Robot,
    Simulator,
    observations,
    slow_call,
    wait,
    write_parameters,
)
from std_msgs.msg import Float64MultiArray


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("robot", [{"before": slow_call(3)}], indirect=True)
def test_a_signal_while_predicting(robot: Robot, number: signal.Signals) -> None:
    """Nothing is sent from the signal on, not even what was being predicted."""
    simulator, seen = robot.simulator, observations(3)
    for observation in seen[:2]:
        simulator.act(observation)
    simulator.show(seen[2])
    robot.process.wait_for("predicting")
    before = len(simulator.commands)
    assert robot.process.end(number) == 0, robot.process.text()
    time.sleep(0.1)  # what was sent before the process ended has come by now
    assert len(simulator.commands) == before
    assert "Traceback" not in robot.process.text()


@pytest.mark.parametrize("robot", [{"command.when_stopped": "zero"}], indirect=True)
def test_velocities_end_with_zeros(robot: Robot) -> None:
    """Three times to who cannot acknowledge that it has heard."""
    simulator, heard = robot.simulator, []
    lossy = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
    simulator.node.create_subscription(Float64MultiArray, "/commands", heard.append, lossy)
    wait(lambda: heard)

    def moves() -> bool:
        simulator.show(observations(1)[0])
        return list(heard[-1].data) != [0, 0]

    wait(moves)
    assert robot.process.end() == 0, robot.process.text()
    wait(lambda: [list(each.data) for each in heard[-3:]] == [[0, 0]] * 3)
    assert list(heard[-4].data) != [0, 0]
    assert list(simulator.commands[-1].data) == [0, 0]


BROKEN = """
from vqbet_edge import EdgePolicy, NonFiniteError
act, calls = EdgePolicy.act, []
def broken(self, *arguments):
    calls.append(1)
    if len(calls) == 3:
        raise NonFiniteError("the code logits are not finite")
    return act(self, *arguments)
EdgePolicy.act = broken
"""
ACTIVATE = 3


@pytest.mark.parametrize("robot", [{"before": BROKEN}], indirect=True)
def test_a_policy_that_fails_deactivates(robot: Robot) -> None:
    """And the node can be activated again."""
    simulator, seen = robot.simulator, observations(6)
    for observation in seen[:2]:
        simulator.act(observation)
    before = len(simulator.commands)
    simulator.show(seen[2])
    wait(lambda: "failed: NonFiniteError" in simulator.said()[0])
    assert simulator.state() == "inactive"
    simulator.stands(0.2)
    assert len(simulator.commands) == before
    assert simulator.change(ACTIVATE)
    simulator.act(seen[4])


CONFIGURE = 1


def test_a_node_that_cannot_be_configured_says_why(tmp_path: Path) -> None:
    parameters = write_parameters(tmp_path, {"use_sim_time": True, "autostart": False})
    process, simulator = Process(parameters), Simulator()
    try:
        for _ in range(2):
            assert simulator.state() == "unconfigured"
            assert not simulator.change(CONFIGURE)
            process.wait_for("cannot be configured: simulated time does not pass")
        assert "Traceback" not in process.text()
    finally:
        assert process.end() == 0
        simulator.close()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bundle": "/nowhere.bundle"}, "/nowhere.bundle"),
        ({"max_agee": 1.0}, "did you mean 'max_age'"),
        ({"command.when_stopped": None}, "command.when_stopped"),
    ],
)
def test_who_started_the_process_sees_that_the_node_did_not_start(
    tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    process = Process(write_parameters(tmp_path, changed))
    assert process.ended() == 1
    assert said in process.text()
    assert "Traceback" not in process.text()

"""The node in this process: its states, again and again."""

import gc
import os
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from robots import FULL, PARAMETERS, Simulator, observations
from vqbet_edge_ros.node import PolicyNode

CYCLES = 1000 if FULL else 30
CONFIGURE, CLEANUP, ACTIVATE, DEACTIVATE = 1, 2, 3, 4
[SEEN] = observations(1)


@pytest.fixture
def node() -> Iterator[PolicyNode]:
    """A node whose callbacks run, as they do in its process."""
    given = [Parameter(name, value=value) for name, value in PARAMETERS.items()]
    node = PolicyNode(parameter_overrides=given)
    executor, ended = SingleThreadedExecutor(), threading.Event()
    executor.add_node(node)

    def spin() -> None:
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.05)

    thread = threading.Thread(target=spin)
    thread.start()
    yield node
    ended.set()
    thread.join()
    executor.remove_node(node)
    node.destroy_node()


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    made = Simulator()
    yield made
    made.close()


def test_cycles_leave_nothing_behind(node: PolicyNode, simulator: Simulator) -> None:
    """Threads, files, entities and memory are as before."""
    process = psutil.Process(os.getpid())

    def figures(cycles: int) -> dict[str, int]:
        for _ in range(cycles):
            assert simulator.change(CONFIGURE)
            assert simulator.change(ACTIVATE)
            simulator.act(SEEN)
            assert simulator.change(DEACTIVATE)
            assert simulator.change(CLEANUP)
        simulator.commands.clear()
        simulator.diagnostics.clear()
        gc.collect()
        entities = (node.publishers, node.subscriptions, node.services, node.timers)
        return {
            "threads": process.num_threads(),
            "files": process.num_fds(),
            "entities": sum(len(list(each)) for each in entities),
            "objects": len(gc.get_objects()),
            "bytes": process.memory_info().rss,
        }

    before, after = figures(10), figures(CYCLES)
    # ROS's own caches fill up at first; a bundle that stayed would be more with every cycle.
    grown = {name: count - before[name] for name, count in after.items()}
    assert grown.pop("bytes") < 20 * 2**20, (before, after)
    assert grown.pop("objects") < CYCLES, (before, after)
    assert set(grown.values()) == {0}, (before, after)


def test_states(node: PolicyNode, simulator: Simulator) -> None:
    """Parameters are read by configure, and services say whether the node is active."""
    assert simulator.state() == "unconfigured"
    assert node.set_parameters([Parameter("seed", value=8)])[0].successful
    assert simulator.change(CONFIGURE)
    [refused] = node.set_parameters([Parameter("seed", value=9)])
    assert not refused.successful
    assert "call cleanup first" in refused.reason
    assert not simulator.reset().success
    assert not simulator.enable(True).success
    simulator.stands()
    assert simulator.change(ACTIVATE)
    simulator.act(SEEN)
    assert simulator.reset().success
    assert simulator.change(DEACTIVATE)
    simulator.stands()
    # What was seen before is not acted on.
    assert simulator.change(ACTIVATE)
    count = len(simulator.commands)
    time.sleep(0.2)
    assert len(simulator.commands) == count
    simulator.act(SEEN)


def test_a_node_that_was_stopped_for_good_sends_nothing(
    node: PolicyNode, simulator: Simulator
) -> None:
    """As after SIGTERM, whatever a lifecycle manager asks meanwhile."""
    assert simulator.change(CONFIGURE)
    node.stop("signal 15")
    assert simulator.change(ACTIVATE)
    simulator.stands()

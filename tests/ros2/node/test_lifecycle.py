"""The node in this process: its states, again and again."""

import gc
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from robots import FULL, PARAMETERS, Simulator, observations
from vqbet_edge_ros.node import PolicyNode

CYCLES = 1000 if FULL else 50


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


CONFIGURE, CLEANUP, ACTIVATE, DEACTIVATE = 1, 2, 3, 4


def cycle(simulator: Simulator, observation: Any) -> None:
    assert simulator.change(CONFIGURE)
    assert simulator.change(ACTIVATE)
    simulator.act(observation)
    assert simulator.change(DEACTIVATE)
    assert simulator.change(CLEANUP)


def test_cycles_leave_nothing_behind(node: PolicyNode) -> None:
    """Threads, files, entities and memory are as before."""
    simulator, [observation] = Simulator(), observations(1)
    process = psutil.Process(os.getpid())

    def figures() -> dict[str, int]:
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

    try:
        for _ in range(10):
            cycle(simulator, observation)
        before = figures()
        for _ in range(CYCLES):
            cycle(simulator, observation)
        after = figures()
    finally:
        simulator.close()
    # ROS's own caches fill up at first; a bundle that stayed would be more with every cycle.
    grown = {name: count - before[name] for name, count in after.items()}
    assert grown.pop("bytes") < 20 * 2**20, (before, after)
    assert grown.pop("objects") < CYCLES, (before, after)
    assert set(grown.values()) == {0}, (before, after)


def test_states(node: PolicyNode) -> None:
    """Parameters are read by configure, and services say whether the node is active."""
    simulator, [observation] = Simulator(), observations(1)
    try:
        assert simulator.state() == "unconfigured"
        assert node.set_parameters([Parameter("seed", value=8)])[0].successful
        assert simulator.change(CONFIGURE)
        [refused] = node.set_parameters([Parameter("seed", value=9)])
        assert not refused.successful
        assert "call cleanup first" in refused.reason
        assert not simulator.reset().success
        assert not simulator.enable(True).success
        for _ in range(20):
            simulator.show(observation)
            time.sleep(0.02)
        assert simulator.commands == []
        assert simulator.change(ACTIVATE)
        simulator.act(observation)
        assert simulator.reset().success
        assert simulator.change(DEACTIVATE)
        count = len(simulator.commands)
        for _ in range(20):
            simulator.show(observation)
            time.sleep(0.02)
        assert len(simulator.commands) == count
    finally:
        simulator.close()


@pytest.mark.usefixtures("node")
def test_the_first_command_after_activation_is_of_a_new_observation() -> None:
    """What was seen before the node was inactive is not acted on."""
    simulator, [observation] = Simulator(), observations(1)
    try:
        assert simulator.change(CONFIGURE)
        assert simulator.change(ACTIVATE)
        simulator.act(observation)
        assert simulator.change(DEACTIVATE)
        count = len(simulator.commands)
        assert simulator.change(ACTIVATE)
        time.sleep(0.3)
        assert len(simulator.commands) == count
        simulator.act(observation)
    finally:
        simulator.close()


def test_a_node_that_was_stopped_for_good_sends_nothing(node: PolicyNode) -> None:
    """As after SIGTERM, whatever a lifecycle manager asks meanwhile."""
    simulator, [observation] = Simulator(), observations(1)
    try:
        assert simulator.change(CONFIGURE)
        node.stop("signal 15")
        assert simulator.change(ACTIVATE)
        for _ in range(20):
            simulator.show(observation)
            time.sleep(0.02)
        assert simulator.commands == []
    finally:
        simulator.close()

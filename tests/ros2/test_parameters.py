"""The node's parameters, and the file that explains them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from vqbet_edge_ros.images import ENCODINGS
from vqbet_edge_ros.parameters import Parameters, defaults, parse

from vqbet_edge import Guards, UsageError, VQBeTEdgeError
from vqbet_edge.runtime.guards.actions import GuardCounts

PACKAGE = Path(__file__).parents[2] / "integrations" / "ros2"
NEEDED: dict[str, Any] = {
    "bundle": "x.bundle", "cameras.topics": ["/c"], "state.joints": ["a"], "command.topic": "/out",
}  # fmt: skip


def test_the_example_has_every_parameter_with_its_default() -> None:
    text = (PACKAGE / "config" / "pusht.yaml").read_text()
    given = yaml.safe_load(text)["/**"]["ros__parameters"]
    parse(given)
    # What it shows in a comment counts too.
    shown = re.sub(r"(?m)^    # ((state\.|command\.|guards\.|require:))", r"    \1", text)
    assert set(yaml.safe_load(shown)["/**"]["ros__parameters"]) == set(defaults())
    example = {
        "bundle", "cameras.keys", "cameras.topics", "state.joints", "command.topic",
        "command.when_stopped", "rate",
    }  # fmt: skip
    for name, value in given.items():
        assert name in example or value == defaults()[name], name


def test_the_readme_names_parameters_that_there_are() -> None:
    """In its code, and wherever it puts a word of a parameter's form between backticks."""
    text = (PACKAGE / "README.md").read_text()
    groups = {name.partition(".")[0] for name in defaults() if "." in name}
    snippets = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    given = [yaml.safe_load(each) for each in snippets]
    ours = [each for each in given if set(map(_group, each)) <= groups]
    assert len(ours) == 3
    for each in ours:
        whole = {"state.joints", "command.topic"} if "command.parts" in each else set()
        parse({name: value for name, value in NEEDED.items() if name not in whole} | each)
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)(?:: [a-z_]+)?`", text)
    counts = {"guards." + name for name in GuardCounts._fields}
    dotted = {name for name in named if _group(name) in groups and "." in name}
    plain = {"rate", "prove", "autostart", "max_age", "max_skew", "max_repeats", "timeout",
             "resume_within", "stamps"}  # fmt: skip
    assert plain <= set(named)
    for name in (dotted - counts) | plain:
        assert name in defaults(), name
    for choice in set(re.findall(r"`([a-z_.]+: [a-z_]+)`", text)) - {"interface_name: velocity"}:
        parse(NEEDED | yaml.safe_load(choice))
    assert {each for each in ENCODINGS if f"`{each}`" not in text} == set()


def _group(name: str) -> str:
    return name.partition(".")[0]


def test_what_is_left_out_has_its_default() -> None:
    parsed = parse(NEEDED)
    default = Parameters("x.bundle", cameras=parsed.cameras, states=parsed.states,
                         commands=parsed.commands)  # fmt: skip
    assert parsed == default
    assert parse(defaults() | NEEDED) == parsed
    # ROS reads an empty list of a file as nothing at all.
    assert parse(NEEDED | {"state.scale": None, "rate": 0}) == parsed


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("teleop.after", "stop", r"Invalid enum value 'stop' - at `\$\.teleop\.after`"),
        ("backend", "cuda", r"Invalid enum value 'cuda' - at `\$\.backend`"),
        ("command.type", "gripper", r"at `\$\.command\.type`; config/pusht\.yaml explains"),
        ("max_agee", 0.1, "did you mean 'max_age'"),
        ("guards.max_chang", [1.0], "did you mean 'guards.max_change'"),
        ("rate", "fast", r"Expected `float`, got `str` - at `\$\.rate`"),
        ("rate", True, "Expected `float`, got `bool`"),
        ("seed", 1.5, "Expected `int`, got `float`"),
        ("rate", float("nan"), "expected 'rate' of 0 or more"),
        ("predict_within", float("nan"), "expected 'predict_within' in seconds"),
        ("require", ["cuda"], r"Invalid enum value 'cuda' - at `\$\.require\[0\]`"),
        ("max_repeats", -1, "expected 'max_repeats' of 0 or more"),
        ("resume_within", -1.0, "expected 'resume_within' of 0 or more"),
        ("max_age", 0.0, "expected 'max_age' above 0"),
        ("timeout", float("inf"), "expected 'timeout' above 0"),
        ("bundle", "", "'bundle' is missing"),
        ("state.joints", [], "'state.joints' is missing"),
        ("cameras.topics", "/c", "Expected `array`, got `str`"),
    ],
)
def test_wrong_parameters_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(NEEDED | {name: value})


def test_a_trajectory_is_held_and_not_slowed() -> None:
    trajectory = NEEDED | {"command.type": "trajectory"}
    assert parse(trajectory).commands[""].type == "trajectory"
    for wrong in (
        {"command.when_stopped": "silence"},
        {"command.when_stopped": "zero"},
        {"guards.max_change": [1.0]},
    ):
        with pytest.raises(UsageError, match="trajectory"):
            parse(trajectory | wrong)


def test_guards_are_those_of_the_policy() -> None:
    assert parse(NEEDED).guards.guards(0.2) == Guards(max_age_s=0.2)
    given = {
        "guards.action_limits": "given", "guards.lowest": [0], "guards.highest": [5.0],
        "guards.max_change": [0.5], "guards.state_limits": "data", "guards.deadline": 0.05, "guards.on_late": "hold",
    }  # fmt: skip
    assert parse(NEEDED | given).guards.guards(0.1) == Guards(
        action_limits=((0.0,), (5.0,)), max_change=(0.5,), state_limits="data", max_age_s=0.1, deadline_s=0.05,
        on_late="hold",
    )  # fmt: skip
    assert parse(NEEDED | {"guards.action_limits": "none"}).guards.guards(1).action_limits is None
    with pytest.raises(VQBeTEdgeError):
        parse(NEEDED | {"guards.margin": -1.0}).guards.guards(0.1)

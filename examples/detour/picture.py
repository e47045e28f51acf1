"""The paths of many episodes in one scene."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from vqbet_edge.training.evaluation.detour import GOAL_RADIUS, Scene
from vqbet_edge.training.evaluation.rollout import Episode
from vqbet_edge.training.files import writing


def draw_paths(scene: Scene, paths: Mapping[str, Sequence[Episode]], target: Path) -> None:
    """A panel per policy: solved episodes in blue, crashed ones in red."""
    figure = Figure(figsize=(5 * len(paths), 5.4), layout="constrained")
    axes = figure.subplots(1, len(paths), squeeze=False)
    for axis, (name, episodes) in zip(axes.flat, paths.items(), strict=True):
        axis.add_patch(
            Rectangle(tuple(scene.bar - scene.half_size), *2 * scene.half_size, color="0.2")
        )
        axis.add_patch(Circle(tuple(scene.goal), GOAL_RADIUS, color="tab:green", alpha=0.6))
        for episode in episodes:
            color = "tab:blue" if episode.success else "tab:red"
            axis.plot(*episode.states.T, ".-", color=color, linewidth=0.8, markersize=3, alpha=0.6)
        left = sum(passes_left(episode, scene) for episode in episodes if episode.success)
        solved = sum(episode.success for episode in episodes)
        axis.set_title(
            f"{name}\n{solved} of {len(episodes)} arrive: {left} left, {solved - left} right"
        )
        axis.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])
    with writing(target):
        figure.savefig(target, dpi=120)


def passes_left(episode: Episode, scene: Scene) -> bool:
    """Whether the robot was left of the bar when level with it."""
    level = int(np.argmin(np.abs(episode.states[:, 1] - scene.bar[1])))
    return bool(episode.states[level, 0] < scene.bar[0])

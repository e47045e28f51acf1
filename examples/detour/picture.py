"""The paths of many episodes in some scenes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from vqbet_edge.training.evaluation.detour import GOAL_RADIUS, MAX_STEPS, Scene
from vqbet_edge.training.evaluation.rollout import Episode
from vqbet_edge.training.files import writing


def draw_paths(
    scenes: Sequence[Scene], paths: Mapping[str, Sequence[Sequence[Episode]]], target: Path
) -> None:
    """A row per policy, a column per scene: what arrives in blue, what crashes in red."""
    size = 3 * len(scenes), 3.2 * len(paths)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(paths), len(scenes), squeeze=False)
    for row, (name, by_scene) in zip(axes, paths.items(), strict=True):
        for axis, scene, episodes in zip(row, scenes, by_scene, strict=True):
            _draw(axis, scene, episodes)
        row[0].set_ylabel(name)
    with writing(target):
        figure.savefig(target, dpi=100)


def _draw(axis: Axes, scene: Scene, episodes: Sequence[Episode]) -> None:
    bar = Rectangle((0, 0), *2 * scene.half_size, color="0.2")
    bar.set_xy(tuple(scene.bar - scene.half_size))
    axis.add_patch(bar)
    axis.add_patch(Circle(tuple(scene.goal), GOAL_RADIUS, color="tab:green", alpha=0.6))
    for episode in episodes:
        color = "tab:blue" if episode.success else "tab:red"
        axis.plot(*episode.states.T, ".-", color=color, linewidth=0.8, markersize=3, alpha=0.6)
    arrived = [episode for episode in episodes if episode.success]
    left = sum(passes_left(episode, scene) for episode in arrived)
    crashed = sum(map(crashes, episodes))
    axis.set_title(f"{left} left, {len(arrived) - left} right, {crashed} crash", fontsize="medium")
    axis.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])


def passes_left(episode: Episode, scene: Scene) -> bool:
    """Whether the robot was left of the bar when level with it."""
    level = int(np.argmin(np.abs(episode.states[:, 1] - scene.bar[1])))
    return bool(episode.states[level, 0] < scene.bar[0])


def crashes(episode: Episode) -> bool:
    """Whether the robot touched the bar, which ends an episode before its time."""
    return not episode.success and episode.steps < MAX_STEPS

"""Recipes: other defaults, which every flag overrides."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vqbet_edge.training import TrainConfig, cli
from vqbet_edge.training.recipes import RECIPES, Recipe

NEEDED = ["--dataset", "d", "--output", "o"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    def parse(*arguments: str) -> TrainConfig:
        monkeypatch.setattr(sys, "argv", ["vqbet-train", *NEEDED, *arguments])
        return cli.parsed().train

    return parse


def test_without_a_recipe_the_defaults_are_lerobots(command: Callable[..., TrainConfig]) -> None:
    assert command() == TrainConfig(dataset="d", output=Path("o"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_its_values(name: Recipe, command: Callable[..., TrainConfig]) -> None:
    config = TrainConfig(dataset="d", output=Path("o"), **RECIPES[name])
    assert command("--recipe", name) == command(f"--recipe={name}") == config
    assert RECIPES[name].items() <= asdict(config).items()
    changed = command("--steps", "5000", "--recipe", name, "--crop-shape", "None")
    assert changed == replace(config, steps=5000, crop_shape=None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "large", *NEEDED], "choose from"),
        (["--recipe", "small"], "--dataset"),
    ],
)
def test_mistakes_are_of_usage(arguments: list[str], said: str) -> None:
    code = "from vqbet_edge.training.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr

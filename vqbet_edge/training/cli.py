"""`vqbet-train`: the command line is the configuration."""

import argparse
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from vqbet_edge.cli import parse, run
from vqbet_edge.training.config import TrainConfig
from vqbet_edge.training.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class Arguments:
    """Train VQ-BeT in its two phases."""

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    # Other defaults of all flags. small: what a computer without a GPU trains in minutes to hours.
    recipe: Recipe | None = None


def main() -> None:
    """Entry point."""
    # The step is finished and saved first; a second signal ends it at once.
    run(_main)


def _main() -> None:
    config = parsed().train
    from vqbet_edge.training.trainer import train  # noqa: PLC0415 - slow, not needed for --help

    sys.stdout.write(f"{train(config)}\n")


def parsed() -> Arguments:
    """The command line, with the recipe's defaults; what is required stays so."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES)
    name = parser.parse_known_args()[0].recipe
    values = RECIPES[name] if name else {}
    train = TrainConfig(dataset=tyro.MISSING, output=tyro.MISSING, **values)
    return parse(Arguments, "vqbet-train", default=Arguments(train, name))

"""`vqbet-train`: the command line is the configuration."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
    """The command line, with the recipe's and the checkpoint's defaults; the required stays so."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--pretrained")
    parser.add_argument("--pretrained-vqvae", "--pretrained_vqvae")
    parser.add_argument("--output", type=Path)
    for name in ("--resume", "--help", "-h"):
        parser.add_argument(name, action="store_true")
    given = parser.parse_known_args()[0]
    train = TrainConfig(dataset=tyro.MISSING, output=tyro.MISSING, **_defaults(given))
    return parse(Arguments, "vqbet-train", default=Arguments(train, given.recipe))


def _defaults(given: argparse.Namespace) -> dict[str, Any]:
    values = dict(RECIPES[given.recipe]) if given.recipe else {}
    source = given.pretrained or given.pretrained_vqvae
    resumed = given.output if given.resume else None
    if (source is None and resumed is None) or given.help or given.h:
        return values
    from vqbet_edge.training import pretrained  # noqa: PLC0415 - slow, and seldom needed

    if resumed is not None and (own := pretrained.resumed_fields(resumed)):
        return {**values, **own}
    if source is None:
        return values
    alone = given.pretrained is None
    return pretrained.pretrained_fields(source, vqvae_alone=alone, others=values)

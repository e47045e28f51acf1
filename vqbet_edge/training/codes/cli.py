"""`vqbet-codes`: what a policy's codes mean and whether its codebook is healthy."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from vqbet_edge.cli import parse, run
from vqbet_edge.errors import UsageError
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.codes.findings import Finding, judge
from vqbet_edge.training.codes.page import render
from vqbet_edge.training.codes.policies import CodedPolicy
from vqbet_edge.training.codes.report import examine_codes
from vqbet_edge.training.config import check_positive
from vqbet_edge.training.dataset.samples import open_source
from vqbet_edge.training.files import replace_bytes, writing


@dataclass(frozen=True)
class CodesConfig:
    """What a policy's codes mean, on one page of HTML, with JSON beside it.

    Raises:
        UsageError: a value is out of its range.
    """

    # A checkpoint or a bundle: a directory or a Hub id (user/name, user/name@revision).
    policy: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT_OR_BUNDLE")]
    # Demonstrations to compare with: a LeRobot data set's folder or id, or what policy.record
    # wrote. None says what the codebook alone tells.
    data: Annotated[
        str | None, tyro.conf.arg(aliases=["--recording"], metavar="DATASET_OR_FOLDER")
    ] = None
    # Page to write; the JSON beside it has the same name.
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="PATH")] = Path("codes.html")
    # Predict at so many frames at most, of whole episodes spread over the data.
    frames: int = 2000

    def __post_init__(self) -> None:
        check_positive(self, "frames")
        if self.output.suffix != ".html":
            raise UsageError(f"--output is a page, expected NAME.html, got '{self.output}'")


def write_report(
    config: CodesConfig,
    episodes: Sequence[int] | None = None,
    among: Sequence[int | str] | None = None,
) -> tuple[Finding, ...]:
    """Look at the codes and write the page and its JSON; progress goes to stderr.

    Args:
        config: what and where.
        episodes: positions of the episodes to predict on; None chooses from all.
        among: numbers of a data set's episodes that all this is about; None means all.

    Returns:
        What is healthy and what to change.

    Raises:
        CheckpointError, BundleError, BackendError: the policy cannot be loaded.
        DatasetError: the data does not fit the policy, or is damaged.
        DiskError: the page cannot be written.
    """
    policy = CodedPolicy(config.policy, *load_backend(config.policy))
    source = None if config.data is None else open_source(config.data, among)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("predicting", total=None)
        report = examine_codes(
            policy,
            source,
            config.frames,
            episodes,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    findings = judge(report)
    with writing(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
    figures = msgspec.json.encode({"findings": findings, **vars(report)}, enc_hook=_plain)
    replace_bytes(config.output.with_suffix(".json"), msgspec.json.format(figures, indent=1))
    replace_bytes(config.output, render(report, findings).encode())
    return findings


def _plain(value: object) -> object:
    """An array as lists; figures have six digits."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value)} in a report")
    if value.dtype.kind == "f":
        value = np.array([float(f"{x:.6g}") for x in value.flat]).reshape(value.shape)
    return value.tolist()


def text(findings: Sequence[Finding]) -> str:
    """The findings for a terminal."""
    lines = [f"{f.level}: {f.text}" + (f"\n  {f.change}" if f.change else "") for f in findings]
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    config = parse(CodesConfig, "vqbet-codes")
    sys.stdout.write(f"{text(write_report(config))}\n{config.output}\n")

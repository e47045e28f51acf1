"""`vqbet-view`: what a robot saw and decided, on one time line."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vqbet_edge.cli import parse, run
from vqbet_edge.errors import DiskError, UsageError
from vqbet_edge.runtime.extras import install_command
from vqbet_edge.view.episodes import open_episodes

# Top-level module -> the extra that brings it.
_EXTRAS = {"PIL": "view", "mcap": "mcap"}


@dataclass(frozen=True)
class ViewConfig:
    """Show a recording with decisions, or a folder of them.

    Raises:
        UsageError: a value is out of its range.
    """

    # What `policy.record(folder, decisions=True)` or `vqbet-eval --record` wrote.
    folder: tyro.conf.Positional[Path]
    # A page for any browser, or an MCAP file for Foxglove and MCAP's own tools.
    to: Literal["html", "mcap"] = "html"
    # The file to write; without it, the folder's name with .html or .mcap, beside the folder.
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    # Only these episodes, by their place in the page, from 0; without them all.
    episodes: tuple[int, ...] = ()
    # Most that a page may take; frames are left out evenly to keep to it.
    megabytes: float = 20.0

    def __post_init__(self) -> None:
        if not self.megabytes >= 1:
            raise UsageError(f"--megabytes must be at least 1, got {self.megabytes:g}")


def view(config: ViewConfig) -> Path:
    """Write the view; returns its path.

    Raises:
        DatasetError: the folder holds no recording with decisions, or a damaged one.
        DiskError: the file cannot be written.
        UsageError: the format's package is not installed, or an episode is not there.
    """
    shown = open_episodes(config.folder, config.episodes)
    folder = config.folder.resolve()
    target = config.output or folder.with_name(f"{folder.name}.{config.to}")
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Each needs a package of its own.
        if config.to == "html":
            from vqbet_edge.view import to_html  # noqa: PLC0415

            page = to_html.page(shown, folder.name, int(config.megabytes * 1e6))
            partial.write_text(page, encoding="utf-8")
        else:
            from vqbet_edge.view import to_mcap  # noqa: PLC0415

            to_mcap.write(shown, partial)
        partial.replace(target)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise UsageError(
            f"--to {config.to} needs '{error.name}'; type: {install_command(extra)}"
        ) from error
    except OSError as error:
        raise DiskError(f"cannot write '{target}': {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    sys.stdout.write(f"{view(parse(ViewConfig, 'vqbet-view'))}\n")

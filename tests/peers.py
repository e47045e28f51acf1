"""Programs of other projects that run beside ours, each in a process of its own."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import oracle

# PushT's sizes with a small transformer.
PUSHT = oracle.small("lerobot_pusht")


@dataclass(frozen=True)
class Robot:
    """A checkpoint of LeRobot's and the bundle made of it."""

    checkpoint: Path
    bundle: Path


@dataclass(frozen=True)
class Peer:
    """A Python with LeRobot, into which the wheels were installed."""

    python: str
    installed: Path

    def run(
        self, *arguments: str | Path, also: Path | None = None, cwd: Path
    ) -> subprocess.CompletedProcess[str]:
        """Run it, away from the network."""
        return subprocess.run(
            [self.python, *arguments],
            env=self.environment(also),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def environment(self, also: Path | None = None) -> dict[str, str]:
        """Variables of its processes; `also` holds another plugin."""
        places = [str(place) for place in (self.installed, also) if place is not None]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(places),
            "HF_HUB_OFFLINE": "1",
            "SDL_VIDEODRIVER": "dummy",
            "OMP_NUM_THREADS": "1",
        }

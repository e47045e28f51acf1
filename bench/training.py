"""Samples a second of phase 2 beside LeRobot's own trainer, on the GPU or, in a tiny form, the CPU.

    python bench/training.py --dataset FOLDER --output throughput.json

Every variant is a process of its own that trains as its command line would, and is timed from the
end of one update to the end of another, data included. They take turns. On a GPU it is also counted
how often an update makes the host wait for the device. Wanted: pip install -e '.[train]' lerobot.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import tyro

Update: TypeAlias = Callable[..., Any]
PHASE1 = 2  # steps, which are not timed
# Our flags; LeRobot has its precision from accelerate.
VARIANTS: dict[str, list[str]] = {
    "lerobot": [],
    "lerobot bf16": [],
    "vqbet_edge": [],
    "vqbet_edge bf16": ["--mixed-precision", "bf16"],
    "vqbet_edge compiled": ["--compile"],
    "vqbet_edge bf16 compiled": ["--mixed-precision", "bf16", "--compile"],
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    # A LeRobot data set's folder.
    dataset: Path
    # Where the figures go.
    output: Path
    # Windows per step.
    batch_size: int = 64
    # Steps that are timed, and those before them.
    steps: int = 100
    warmup: int = 20
    # LeRobot's processes that decode.
    workers: int = 4
    # How often each variant is measured.
    turns: int = 3
    # Which variants.
    variants: tuple[str, ...] = tuple(VARIANTS)
    # More flags of both trainers, by LeRobot's names, such as n_obs_steps=2.
    policy: tuple[str, ...] = ()
    # This process is a variant's, and prints what it measures.
    measure: str | None = None

    @property
    def total(self) -> int:
        """Steps of a run."""
        return PHASE1 + self.warmup + self.steps + 1  # whose waits are counted


class Clock:
    """Times updates of phase 2."""

    def __init__(self, options: Options, before: int) -> None:
        self._first = before + options.warmup
        self._last = self._first + options.steps
        self._calls, self._started = 0, 0.0
        self.measured: dict[str, float] = {}
        self._rows = options.steps * options.batch_size

    def around(self, update: Update) -> Update:
        """The same update, timed."""

        def timed(*args: Any, **named: Any) -> Any:  # noqa: ANN401
            self._calls += 1
            if self._calls > self._last and torch.cuda.is_available():
                return self._counted(update, *args, **named)
            found = update(*args, **named)
            if self._calls == self._first:
                self._started = _now()
            elif self._calls == self._last:
                self.measured["samples_per_second"] = self._rows / (_now() - self._started)
                if torch.cuda.is_available():
                    self.measured["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            return found

        return timed

    def _counted(self, update: Update, *args: Any, **named: Any) -> Any:  # noqa: ANN401
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = update(*args, **named)
        torch.cuda.set_sync_debug_mode("default")
        self.measured["waits_per_update"] = sum("synchron" in str(w.message) for w in caught)
        return found


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def vqbet_edge(options: Options, flags: list[str], folder: Path) -> Clock:
    """Our command line, without the report at its end."""
    from vqbet_edge.training import trainer  # noqa: PLC0415 - LeRobot's process has no need of it
    from vqbet_edge.training.config import TrainConfig  # noqa: PLC0415
    from vqbet_edge.training.phases import Phase, PolicyPhase  # noqa: PLC0415

    clock = Clock(options, 0)
    PolicyPhase.update = clock.around(Phase.update)  # type: ignore[method-assign]
    for name in ("write_report", "text"):
        setattr(trainer, name, lambda *_: "")
    arguments = [
        f"--dataset={options.dataset}", f"--output={folder}", f"--steps={options.total}",
        f"--n-vqvae-training-steps={PHASE1}", f"--batch-size={options.batch_size}",
        "--save-every=1000000", "--validation-fraction=0", *flags,
    ]  # fmt: skip
    for entry in options.policy:
        name, _, value = entry.partition("=")
        arguments += [f"--{name}", *value.strip("[]").split(",")]
    trainer.train(tyro.cli(TrainConfig, args=arguments))
    return clock


def lerobot(options: Options, folder: Path) -> Clock:
    """LeRobot's."""
    from lerobot.scripts import lerobot_train  # noqa: PLC0415 - ours has no need of it

    clock = Clock(options, PHASE1)
    lerobot_train.update_policy = clock.around(lerobot_train.update_policy)
    sys.argv = [
        "lerobot-train", "--policy.type=vqbet", "--policy.push_to_hub=false",
        f"--dataset.root={options.dataset}", f"--dataset.repo_id=bench/{options.dataset.name}",
        f"--output_dir={folder}", f"--steps={options.total}", f"--batch_size={options.batch_size}",
        f"--num_workers={options.workers}", f"--policy.n_vqvae_training_steps={PHASE1}",
        "--save_checkpoint=false", "--eval_freq=0", "--log_freq=100",
        f"--policy.device={'cuda' if torch.cuda.is_available() else 'cpu'}",
        *(f"--policy.{entry}" for entry in options.policy),
    ]  # fmt: skip
    lerobot_train.main()
    return clock


def measure(options: Options, name: str) -> dict[str, float]:
    """One variant, in this process."""
    folder = Path(tempfile.mkdtemp())
    try:
        if name.startswith("lerobot"):
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if "bf16" in name else "no"
            return lerobot(options, folder / "run").measured
        return vqbet_edge(options, VARIANTS[name], folder / "run").measured
    finally:
        shutil.rmtree(folder)


def main(options: Options) -> int:
    """Every variant in turn; how many failed."""
    if options.measure is not None:
        sys.stdout.write("\n" + json.dumps(measure(options, options.measure)) + "\n")
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    failed = 0
    for name in options.turns * options.variants:
        command = [sys.executable, *sys.argv, "--measure", name]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if ended.returncode:
            failed += 1
            sys.stderr.write(f"{name} failed:\n{ended.stderr[-2000:]}\n")
            continue
        found[name].append(json.loads(ended.stdout.splitlines()[-1]))
        sys.stderr.write(f"{name}: {found[name][-1]}\n")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "device": device,
        "torch": torch.__version__,
        "options": {k: v for k, v in vars(options).items() if k not in {"output", "measure"}},
        "median": {
            name: {key: statistics.median(t[key] for t in turns) for key in turns[0]}
            for name, turns in found.items()
            if turns
        },
        "turns": found,
    }
    options.output.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)) > 0)

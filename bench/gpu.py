"""All that a GPU has to show and no other machine can, without TensorRT and without a network.

    python bench/gpu.py tests/data/pusht outputs/gpu --minutes 45

1. The CUDA backends' machinery on the real driver (`gpu_checks`).
2. LeRobot's default policy trained on the data set for the time given, its curves, its score on
   PushT, and that of its bundles in FP16 and INT8.
3. The checks again, on the trained policy: what the GPU computes of it.

Wanted: pip install -e '.[export,train,sim]' cuda-bindings; it goes on after a step that fails, and
RESULTS/gpu.json has the outcome of all of them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = [str(ROOT / name) for name in ("", "export", "calibration", "engines", "bench")]
sys.path[:0] = PLACES

import gpu_checks  # noqa: E402
import tyro  # noqa: E402

from vqbet_edge.runtime.backends.child import module_command  # noqa: E402
from vqbet_edge.runtime.bundle import Bundle  # noqa: E402
from vqbet_edge.training.checkpoint import load_checkpoint  # noqa: E402

_PROBES = 100, 400  # steps; their difference in time is free of the start
_VQVAE_SHARE = 0.08  # LeRobot's 20,000 of 250,000 steps


@dataclass(frozen=True)
class Arguments:
    """Check the CUDA backends on this machine's GPU, then train, evaluate and export."""

    # LeRobot data set of PushT.
    dataset: tyro.conf.Positional[str]
    # Folder for everything that comes out; must not exist.
    results: tyro.conf.Positional[Path]
    # How long to train.
    minutes: float = 45
    # Episodes of every evaluation.
    episodes: int = 50
    # Streams that are opened and closed.
    loads: int = 10_000
    # Only the checks, on an untrained policy.
    checks_only: bool = False


class Report:
    """What every step came to, on disk after each."""

    def __init__(self, path: Path) -> None:
        self._path, self._steps = path, dict[str, dict[str, object]]()

    def step(self, name: str, work: Callable[[], object]) -> bool:
        """Do it; whether it succeeded."""
        sys.stderr.write(f"== {name}\n")
        start = time.monotonic()
        try:
            outcome, failed = work(), False
        except Exception as error:  # noqa: BLE001 - the rest is still worth its time
            outcome, failed = f"{type(error).__name__}: {error}", True
        seconds = round(time.monotonic() - start, 1)
        self._steps[name] = {"failed": failed, "seconds": seconds, "outcome": outcome}
        self._path.write_text(json.dumps(self._steps, indent=1) + "\n")
        sys.stderr.write(f"{'FAILED: ' if failed else ''}{outcome}\n")
        return not failed

    @property
    def failures(self) -> int:
        """Steps that failed."""
        return sum(bool(step["failed"]) for step in self._steps.values())


def command(module: str, *arguments: object) -> str:
    """One of this package's commands; what it prints on standard output."""
    done = subprocess.run(  # noqa: S603
        module_command(module, *map(str, arguments)),
        stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PLACES)},
    )  # fmt: skip
    return done.stdout


def train(output: Path, dataset: str, steps: int) -> float:
    """Train for some steps of both phases; seconds."""
    start = time.monotonic()
    phase_1 = max(1, round(steps * _VQVAE_SHARE))
    command(
        "vqbet_edge.training.cli", "--dataset", dataset, "--output", output, "--steps", steps,
        "--n-vqvae-training-steps", phase_1, "--save-every", max(1, steps // 4),
    )  # fmt: skip
    return time.monotonic() - start


def train_for(arguments: Arguments, output: Path) -> str:
    """As many steps as the time allows, measured on a few."""
    few, more = (train(arguments.results / f"probe-{n}", arguments.dataset, n) for n in _PROBES)
    rate = (_PROBES[1] - _PROBES[0]) / max(more - few, 1e-3)
    steps = max(_PROBES[1], int(arguments.minutes * 60 * rate))
    seconds = train(output, arguments.dataset, steps)
    return f"{steps} steps in {seconds:.0f} s, {rate:.1f} a second; curves in {output}"


def check_policy(kind: str, bundle: Path, checkpoint: str) -> str:
    """One of the checks that need a policy; `faults` spoils this process's GPU."""
    check = {"policy": gpu_checks.policy, "faults": gpu_checks.faults}[kind]
    return check(Bundle.open(bundle), load_checkpoint(checkpoint), gpu_checks.Gpu())


def checks(report: Report, arguments: Arguments) -> None:
    """What needs no policy."""
    device = gpu_checks.Gpu()
    for name, check in gpu_checks.CHECKS.items():
        options = {"count": arguments.loads} if name == "loads" else {}
        report.step(f"check: {name}", partial(check, device, **options))


def policy_checks(report: Report, bundle: Path, checkpoint: Path) -> None:
    """What needs one, each in a process of its own."""
    for kind in ("policy", "faults"):
        call = [sys.executable, __file__, "--one", kind, str(bundle), str(checkpoint)]
        report.step(f"check: {kind} in {bundle.stem}", partial(_output, call))


def _output(call: list[str]) -> str:
    return subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603


def export(arguments: Arguments, checkpoint: Path, precision: str) -> str:
    """Export and verify on the data set; where to."""
    bundle = arguments.results / f"{precision}.bundle"
    data = ["--calibration-data", arguments.dataset] if precision == "int8" else []
    options = [f"--{precision}", *data, "--verify-data", arguments.dataset, "-o", bundle, "--json"]
    text = command("vqbet_export.cli", checkpoint, *options)
    (arguments.results / f"export-{precision}.json").write_text(text)
    return str(bundle)


def evaluate(arguments: Arguments, name: str, policy: Path) -> str:
    """The score on PushT."""
    options = ["--env", "pusht", "--episodes", arguments.episodes, "--json"]
    backend = ["--backend", "onnxruntime"] if policy.suffix == ".bundle" else []
    text = command("vqbet_edge.training.evaluation.cli", policy, *options, *backend)
    (arguments.results / f"eval-{name}.json").write_text(text)
    return text


def main() -> None:
    """Everything."""
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(check_policy(sys.argv[2], Path(sys.argv[3]), sys.argv[4]))
        return
    arguments = tyro.cli(Arguments)
    arguments.results.mkdir(parents=True)
    report, output = Report(arguments.results / "gpu.json"), arguments.results / "training"
    checks(report, arguments)
    if arguments.checks_only:
        report.step("train", partial(train, output, arguments.dataset, _PROBES[0]))
    else:
        report.step("train", partial(train_for, arguments, output))
    checkpoint = output / "checkpoints/last/pretrained_model"
    if not arguments.checks_only:
        report.step("evaluate the checkpoint", partial(evaluate, arguments, "torch", checkpoint))
    for precision in ("fp32", "fp16", "int8"):
        bundle = arguments.results / f"{precision}.bundle"
        if not report.step(
            f"export {precision}", partial(export, arguments, checkpoint, precision)
        ):
            continue
        if precision != "int8":  # PyTorch has no kernels for it
            policy_checks(report, bundle, checkpoint)
        if precision != "fp32" and not arguments.checks_only:
            report.step(f"evaluate {precision}", partial(evaluate, arguments, precision, bundle))
    sys.exit(report.failures > 0)


if __name__ == "__main__":
    main()

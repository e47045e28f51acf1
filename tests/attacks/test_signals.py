"""SIGINT and SIGTERM end every command in two seconds, with 130 or 143 and the terminal as it was."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from attacks.saving import PUSHT, checkpoints, network, progress
from sizes import SMALL
from torture import cases

from vqbet_edge import cli

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# A busy machine needs longer than an idle one, on which two seconds hold.
SECONDS = cases(10, 2)


# A shell's background jobs, which tests may be, ignore interrupts, and so would their children.
HEED_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


# An export whose last step takes long; the graphs of one target are enough of it.
LONG = ["--verify-steps", "5000", "--target", "tensorrt"]


class Terminal:
    """A command that believes that a person watches it."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self._theirs = theirs
        code = f"{HEED_INTERRUPTS}from {module} import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.text = ""

    def read(self, seconds: float) -> None:
        """What it prints within that time."""
        end = time.monotonic() + seconds
        while select.select([self._ours], [], [], max(0.0, end - time.monotonic()))[0]:
            with contextlib.suppress(OSError):
                self.text += os.read(self._ours, 65536).decode(errors="replace")

    def read_until(self, text: str) -> None:
        """Wait for a text."""
        while text not in self.text and self.process.poll() is None:
            self.read(0.05)
        assert text in self.text, self.text

    def end(self, number: signal.Signals) -> int:
        """Send the signal; the exit code as a shell would show it."""
        self.process.send_signal(number)
        end = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.02)
        late = self.process.poll() is None
        if late:
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.read(0.1)
        assert not late, f"still running: {self.text}"
        assert termios.tcgetattr(self._theirs) == self.before
        assert self.text.rfind("\x1b[?25h") >= self.text.rfind("\x1b[?25l"), "the cursor is gone"
        os.close(self._ours)
        os.close(self._theirs)
        return code if code >= 0 else 128 - code


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    saved = checkpoints(tmp_path_factory.mktemp("saved"))
    saved.save(progress(1), network(), None, {"state": {}, "param_groups": []})
    return str(saved.last / "pretrained_model")


# Two commands by one signal each in every run, the rest in `make test-all`.
INT, TERM = signal.SIGINT, signal.SIGTERM
MORE = pytest.mark.extended


@pytest.mark.parametrize("number", [TERM, pytest.param(INT, marks=MORE)])
def test_export(checkpoint: str, cwd: Path, number: signal.Signals) -> None:
    command = Terminal("vqbet_export.cli", checkpoint, *LONG)
    command.read_until("verifying")
    assert command.end(number) == CODES[number], command.text
    assert list(cwd.iterdir()) == []


@pytest.mark.extended
def test_export_at_random_moments(checkpoint: str, cwd: Path) -> None:
    random = np.random.default_rng(14)
    for case in range(cases(2, 30)):
        number = list(CODES)[case % 2]
        command = Terminal("vqbet_export.cli", checkpoint, *LONG)
        command.read(random.uniform(0.5, 8))
        assert command.end(number) == CODES[number], command.text
        assert not any(path.suffix == ".bundle" for path in cwd.iterdir())


@pytest.mark.parametrize("number", [INT, pytest.param(TERM, marks=MORE)])
def test_train(tmp_path: Path, number: signal.Signals) -> None:
    small = SMALL | {
        "steps": 100_000, "n_vqvae_training_steps": 99_000, "batch_size": 4, "n_obs_steps": 2,
        "log_every": 1, "vqvae_enc_hidden_dim": 32,
    }  # fmt: skip
    options = [text for key, value in small.items() for text in (f"--{key}", str(value))]
    output = tmp_path / "run"
    paths = "--dataset", str(PUSHT), "--output", str(output)
    command = Terminal("vqbet_edge.training.cli", *paths, *options)
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and command.process.poll() is None:
        command.read(0.05)
    assert command.end(number) == CODES[number], command.text
    assert "go on with --resume" in command.text
    assert (output / "checkpoints" / "last" / "training_state").is_dir()


@pytest.mark.extended
@pytest.mark.parametrize("number", [TERM, INT])
def test_eval(checkpoint: str, number: signal.Signals) -> None:
    pytest.importorskip("gym_pusht")
    task = "--env", "pusht", "--episodes", "100000"
    command = Terminal("vqbet_edge.training.evaluation.cli", checkpoint, *task)
    command.read_until("pusht: ")
    command.read(1.5)
    assert command.end(number) == CODES[number], command.text


@pytest.fixture
def heeding() -> Iterator[None]:
    """Interrupts are heeded; a shell's background job ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def raising(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(SECONDS)


@pytest.mark.parametrize("number", CODES)
def test_handlers_are_given_back(number: signal.Signals, heeding: None) -> None:  # noqa: ARG001
    before = [signal.getsignal(each) for each in CODES]
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: raising(number))
    assert ended.value.code == CODES[number]
    assert [signal.getsignal(each) for each in CODES] == before


DYING = """
import os, sys, time
from vqbet_edge import cli

class Dying:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))

def work():
    dying = [Dying()]
    dying.clear()  # Python drops what is raised in there
    time.sleep(60)

cli.run(work)
"""


@pytest.mark.parametrize("number", CODES)
def test_a_signal_in_a_destructor_stops_too(number: signal.Signals) -> None:
    command = [sys.executable, "-c", HEED_INTERRUPTS + DYING, str(int(number))]
    assert subprocess.run(command, timeout=30).returncode == CODES[number]


def test_a_forked_child_has_the_default_handlers() -> None:
    status = 0

    def fork() -> None:
        nonlocal status
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        status = os.waitpid(child, 0)[1]

    with pytest.raises(SystemExit):
        cli.run(fork)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), 5),
        (FileNotFoundError(2, "No such file", "/there"), 5),
        (ConnectionRefusedError(111, "Connection refused"), 1),
    ],
)
def test_only_a_disk_exits_as_a_disk(
    error: OSError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith("error: ")

"""Commands whose libraries are missing say what to install."""

import subprocess
import sys

import pytest

from vqbet_edge.runtime.extras import install_command

WITHOUT = "import sys; sys.modules.update(dict.fromkeys({}, None)); from {} import {} as f; f()"
EXTRAS = {
    "bench": "bench", "build": "cli", "codes": "train", "doctor": "cli", "evaluate": "train",
    "export": "export", "inspect": "cli", "serve": "serve", "train": "train", "view": "view",
}  # fmt: skip


@pytest.mark.parametrize("missing", [("tyro",), ("rich", "tyro")])
@pytest.mark.parametrize("command", EXTRAS)
def test_what_to_install(command: str, missing: tuple[str, ...]) -> None:
    code = WITHOUT.format(missing, "vqbet_edge.commands", command)
    done = subprocess.run([sys.executable, "-c", code, "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "this command needs 'tyro'" in done.stderr or "needs 'rich'" in done.stderr
    assert install_command(EXTRAS[command]) in done.stderr
    assert "Traceback" not in done.stderr

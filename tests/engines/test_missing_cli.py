"""Commands without the extra `cli` say what to install."""

import subprocess
import sys

import pytest

from vqbet_edge.runtime.extras import install_command

WITHOUT = "import sys; sys.modules.update(dict.fromkeys({}, None)); from {} import main; main()"


@pytest.mark.parametrize("module", ["vqbet_engines.cli", "vqbet_engines.doctor"])
@pytest.mark.parametrize("missing", [("tyro",), ("rich", "tyro")])
def test_what_to_install(module: str, missing: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", WITHOUT.format(missing, module), "test.bundle"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert install_command("cli") in done.stderr
    assert "Traceback" not in done.stderr

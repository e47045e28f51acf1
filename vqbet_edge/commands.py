"""Entry points of all commands: where a library is missing, they say what to type."""

import sys
from collections.abc import Callable
from importlib import import_module

from vqbet_edge.errors import UsageError
from vqbet_edge.runtime.extras import install_command


def _command(module: str, extra: str) -> Callable[[], None]:
    """The `main` of a module, which needs an extra."""

    def main() -> None:
        try:
            import_module(module).main()
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("vqbet_"):
                raise
            library = error.name.partition(".")[0]
            sys.stderr.write(
                f"error: this command needs '{library}'; type: {install_command(extra)}\n"
            )
            sys.exit(UsageError.exit_code)

    return main


bench = _command("vqbet_bench.cli", "bench")
build = _command("vqbet_engines.build_command", "cli")
codes = _command("vqbet_edge.training.codes.cli", "train")
dataset = _command("vqbet_edge.training.dataset.from_recordings", "train")
doctor = _command("vqbet_engines.doctor_command", "cli")
evaluate = _command("vqbet_edge.training.evaluation.cli", "train")
export = _command("vqbet_export.cli", "export")
inspect = _command("vqbet_edge.inspection", "cli")
serve = _command("vqbet_serve.cli", "serve")
train = _command("vqbet_edge.training.cli", "train")
view = _command("vqbet_edge.view.command", "view")

"""`vqbet-doctor`: looks at this machine, and at what it makes of a bundle."""

import sys
from dataclasses import dataclass
from typing import Annotated, get_args

import msgspec
import tyro
from rich.console import Console
from rich.table import Table

from vqbet_edge.cli import parse, run
from vqbet_edge.errors import BackendError, UsageError, VerificationError
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.backends.private_files import user_cache
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.proof import prove
from vqbet_engines.doctor import Finding, Fix, Machine, examine
from vqbet_engines.prune import find_unusable

_DOCS = "docs/engines.md"


@dataclass(frozen=True)
class DoctorArguments:
    """Say what is installed here, what is missing, and the command that fixes it."""

    # With a bundle, a directory or a Hub id (user/name, user/name@revision): prove by its reference
    # cases that every backend that is here computes the policy that was trained. Nothing is built.
    bundle: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[BUNDLE]")] = None

    # List the engines in the cache that no TensorRT, driver and GPU of this machine, as this Python
    # sees it, can load; nothing else is done, and with --yes they are deleted.
    prune: bool = False

    # With --prune: delete what it lists.
    yes: bool = False

    # Print the findings as JSON, each fix with the documentation that it was checked against.
    json: bool = False


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    arguments = parse(DoctorArguments, "vqbet-doctor")
    if arguments.prune:
        _prune(delete=arguments.yes)
        return
    if arguments.yes:
        raise UsageError("--yes goes with --prune alone; nothing was done")
    bundle = None if arguments.bundle is None else Bundle.open(arguments.bundle)
    findings, names = examine(Machine()), [n for n in get_args(BackendName) if n != "auto"]
    proofs = [] if bundle is None else [_prove(name, bundle) for name in names]
    if arguments.json:
        text = msgspec.json.format(msgspec.json.encode(findings + proofs), indent=2).decode()
        sys.stdout.write(text + "\n")
    else:
        table = Table("what", "")
        for column in ("found", "to fix it"):
            table.add_column(column, overflow="fold")  # a command is typed whole
        for finding in findings + proofs:
            table.add_row(finding.name, finding.state, finding.value, str(finding.fix or ""))
        Console(markup=False).print(table)
    if wrong := _problems(proofs):
        raise VerificationError(f"{wrong} failed; do not let it move a robot")
    if problems := _problems(findings):
        raise BackendError(f"problems with {problems}; see the commands that fix them")


def _prune(*, delete: bool) -> None:
    table, found = Table("engine", "MiB", "built for"), find_unusable()
    for engine in found:
        if delete:
            engine.remove()
        table.add_row(str(engine.plan), f"{engine.size / 2**20:.1f}", engine.built_for)
    table.columns[0].overflow = "fold"
    console = Console(markup=False, highlight=False)
    if not found:
        console.print(f"every engine in '{user_cache()}' can be loaded here")
        return
    console.print(table)
    console.print("deleted" if delete else "nothing was deleted; type: vqbet-doctor --prune --yes")


def _prove(name: BackendName, bundle: Bundle) -> Finding:
    """Act the reference cases out; closed before the next, for small boards have no memory for two.

    Raises:
        BundleError: it has no reference cases.
    """
    what, build = f"proof on {name}", f"vqbet-build '{bundle.path}'"
    try:
        backend = create_backend(name, bundle, build=False)
        try:
            figures = prove(bundle, backend).table()
        finally:
            backend.close()
    except VerificationError as error:
        fix = Fix(f"{build} --force", _DOCS) if name == "tensorrt" else None
        return Finding(what, "problem", str(error), fix)
    except BackendError as error:
        fix = Fix(build, _DOCS) if build in str(error) else None
        return Finding(what, "note", f"not there: {error}", fix)
    return Finding(what, "ok", "\n".join(f"{row}: {text}" for row, text in figures))


def _problems(findings: list[Finding]) -> str:
    return ", ".join(finding.name for finding in findings if finding.state == "problem")

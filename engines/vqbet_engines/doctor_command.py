"""`vqbet-doctor`: looks at this machine, and at what it makes of a bundle."""

import sys
from dataclasses import dataclass
from typing import Annotated

import msgspec
import tyro
from rich.console import Console
from rich.table import Table

from vqbet_edge.cli import parse, run
from vqbet_edge.errors import BackendError, VerificationError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_engines.doctor import Machine, examine
from vqbet_engines.findings import Finding
from vqbet_engines.proofs import prove_backends


@dataclass(frozen=True)
class DoctorArguments:
    """Say what is installed here, what is missing, and the command that fixes it."""

    # With a bundle, a directory or a Hub id (user/name, user/name@revision): prove by its reference
    # cases that every backend that is here computes the policy that was trained. Nothing is built.
    bundle: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[BUNDLE]")] = None

    # Print the findings as JSON, each fix with the documentation that it was checked against.
    json: bool = False


def main() -> None:
    """Entry point."""
    run(_main)


def _main() -> None:
    arguments = parse(DoctorArguments, "vqbet-doctor")
    bundle = None if arguments.bundle is None else Bundle.open(arguments.bundle)
    findings, proofs = examine(Machine()), [] if bundle is None else list(prove_backends(bundle))
    if arguments.json:
        text = msgspec.json.format(msgspec.json.encode(findings + proofs), indent=2).decode()
        sys.stdout.write(text + "\n")
    else:
        Console(markup=False).print(_table(findings + proofs))
    if wrong := _problems(proofs):
        raise VerificationError(f"{wrong} failed; do not let it move a robot")
    if problems := _problems(findings):
        raise BackendError(f"problems with {problems}; see the commands that fix them")


def _table(findings: list[Finding]) -> Table:
    table = Table("what", "")
    for column in ("found", "to fix it"):
        table.add_column(column, overflow="fold")  # a command is typed whole
    for finding in findings:
        table.add_row(finding.name, finding.state, finding.value, str(finding.fix or ""))
    return table


def _problems(findings: list[Finding]) -> str:
    return ", ".join(finding.name for finding in findings if finding.state == "problem")

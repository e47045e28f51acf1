"""The command `vqbet-inspect`: what is in a bundle, after checking every digest."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vqbet_edge import cli
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Manifest, Target, encode_manifest
from vqbet_edge.runtime.proof import prove
from vqbet_edge.runtime.signatures import cached_gpt_signature, signature

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Arguments:
    """Check a bundle and show what is in it."""

    # The bundle: a directory or a Hub id (user/name, user/name@revision).
    bundle: str
    # Print the manifest as JSON.
    json: bool = False
    # Act the bundle's reference cases out on this machine: the proof that it computes the policy
    # that was trained.
    prove: bool = False
    # Who proves it: the fastest that is there, or one of its names.
    backend: BackendName = "auto"


def main() -> None:
    """Entry point."""
    cli.run(_main)


def _main() -> None:
    import tyro  # noqa: PLC0415 - a robot may lack it, and is told so

    options = (tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff)
    arguments = cli.parse(Arguments, "vqbet-inspect", *options)
    bundle = Bundle.open(arguments.bundle)
    manifest = bundle.manifest
    if arguments.json:
        sys.stdout.write(encode_manifest(manifest).decode())
        return
    from rich.console import Console  # noqa: PLC0415

    console = Console(markup=False)
    console.print(_summary(manifest))
    for target in manifest.targets:
        console.print(_graphs(manifest, target))
    if arguments.prove:
        console.print(_proof(bundle, arguments.backend))


def _proof(bundle: Bundle, name: BackendName) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    backend = create_backend(name, bundle)
    try:
        found = prove(bundle, backend)
    finally:
        backend.close()
    table = Table(
        show_header=False,
        title=f"proven on {found.backend}: {found.steps} predictions, limits of {found.precision}",
    )
    for row in found.table():
        table.add_row(*row)
    return table


def _summary(manifest: Manifest) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    policy, source = manifest.policy, manifest.source
    table = Table(show_header=False, title="every digest is right")
    features = {**manifest.input_features, **manifest.output_features}
    for key, feature in features.items():
        table.add_row(key, f"{feature.type.lower()} {feature.shape}")
    table.add_row("window", f"{policy.n_obs_steps} observations")
    from_state = ", relative to the state" if any(policy.relative_actions) else ""
    table.add_row("action chunk", f"{policy.action_chunk_size} actions{from_state}")
    selection = "sequentially" if policy.sequentially_select else "jointly"
    table.add_row("codes", f"2 x {policy.vqvae_n_embed}, selected {selection}")
    table.add_row("temperature", f"{policy.bet_softmax_temperature:g}")
    table.add_row("checkpoint", f"{source.name} ({source.writer}, {source.sha256[:12]})")
    checked = manifest.verification
    if checked is not None:
        table.add_row(
            "verified",
            f"{checked.samples} observations ({checked.observations}), "
            f"code agreement {checked.code_agreement:.2%}, cosine {checked.min_cosine:.6f}",
        )
    return table


def _graphs(manifest: Manifest, target: Target) -> "Table":
    from rich.table import Table  # noqa: PLC0415

    graphs = manifest.graphs(target)
    sizes = {name: manifest.files[spec.file].size / 1e6 for name, spec in graphs.items()}
    title = f"graphs for {target}: {sum(sizes.values()):.1f} MB"
    table = Table("stage", "precision", "MB", "inputs", "outputs", title=title)
    for name, spec in graphs.items():
        cached = target == "cpu" and name == "gpt"
        both = cached_gpt_signature(manifest) if cached else signature(manifest, name)
        tensors = ["\n".join(f"{t.name} {t.dtype} {t.shape}" for t in part) for part in both]
        table.add_row(name, spec.precision, f"{sizes[name]:.1f}", *tensors)
    return table

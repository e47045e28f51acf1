"""The whole way from a checkpoint to a published bundle."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from vqbet_calibration.quantize import Quantization
from vqbet_calibration.samples import Samples, load_samples

from vqbet_edge.errors import NonFiniteError, UsageError, VerificationError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import CASES_NAME
from vqbet_edge.runtime.lerobot_files import lerobot_files
from vqbet_edge.runtime.manifest import MANIFEST_NAME, TARGETS
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.dataset.samples import PIECE_STEPS, Piece, Sampler, random_pieces
from vqbet_edge.training.families import load_any
from vqbet_edge.training.family import AnyCheckpoint
from vqbet_export.assembly import assemble
from vqbet_export.cases import CASES, CaseChooser, frame_of
from vqbet_export.config import ExportConfig
from vqbet_export.demonstrations import find_demonstrations, notes_on
from vqbet_export.publishing import publish
from vqbet_export.quantization import quantize_bundle
from vqbet_export.reference import run_reference
from vqbet_export.report import report_data, report_markdown
from vqbet_export.verification import ObservationKind, Verification, Verifier, summarize


class ExportResult(NamedTuple):
    """A published bundle, its report, and what else to know about it."""

    path: Path
    report: dict[str, Any]
    notes: tuple[str, ...]


Progress = Callable[[str], None]


def export(config: ExportConfig, progress: Progress = lambda _: None) -> ExportResult:
    """Export a checkpoint, verify the graphs and publish the bundle.

    Args:
        config: what to do.
        progress: is told what happens next.

    Raises:
        CheckpointError, DatasetError: the input does not do.
        UsageError: the bundle exists and `force` is not set, or options do not go together.
        VerificationError: the graphs do not compute the policy; nothing was published.
        DiskError: the bundle cannot be written.
    """
    _check(config)
    progress("loading the checkpoint")
    checkpoint = load_any(config.checkpoint)
    data = find_demonstrations(checkpoint, config)  # what does not fit is said before the work
    checkpoint = data.complete(checkpoint, config)
    draft = _draft(checkpoint, config, progress)
    results, cases, kind = _verify(draft, checkpoint, config, data.sampler, progress)
    progress("writing the bundle")
    summary = summarize(results, kind)
    manifest = msgspec.structs.replace(draft.bundle.manifest, verification=summary)
    notes = (*data.notes, *notes_on(manifest, checkpoint, results))
    report = report_data(manifest, config.precision, results, draft.quantizations, notes)
    contents = {**draft.bundle.contents, CASES_NAME: cases}
    contents |= lerobot_files(manifest, checkpoint.license)
    contents["report.json"] = msgspec.json.format(msgspec.json.encode(report), indent=2)
    contents["report.md"] = report_markdown(report, draft.bundle).encode()
    publish(config.output, contents, manifest)
    return ExportResult(config.output, report, notes)


def _check(config: ExportConfig) -> None:
    output, int8 = config.output, config.precision == "int8"
    if output.exists() and not (output / MANIFEST_NAME).exists():
        raise UsageError(f"'{output}' exists and is no bundle; choose another place with -o")
    if output.exists() and not config.force:
        raise UsageError(f"'{output}' exists; replace it with --force, or choose another -o")
    if int8 and config.calibration_data is None:
        raise UsageError(
            "--int8 needs observations to calibrate on: pass --calibration-data with the data set "
            "that the policy was trained on (a folder in LeRobot's format or a Hub id), or with a "
            "folder of what the robot saw, recorded on it in FP16 or FP32 by "
            "`with policy.record(folder): ...`. Random numbers would not do: they give ranges "
            "that a camera never fills"
        )
    if not int8 and config.calibration_data is not None:
        raise UsageError("--calibration-data is for --int8; add it, or verify with --verify-data")
    for name in ("verify_steps", "calibration_steps"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    if config.fps is not None and not 0 < config.fps < float("inf"):
        raise UsageError(f"--fps takes observations a second, above 0; got {config.fps:g}")


class _Draft(NamedTuple):
    """A bundle to be verified; for INT8, with what it was quantised on and how."""

    bundle: Bundle
    samples: Samples | None = None
    quantizations: tuple[Quantization, ...] = ()

    def noise(self, steps: int) -> Iterator[Piece]:
        manifest = self.bundle.manifest
        scaling = Affine.from_arrays(self.bundle.arrays, "state", manifest.state_dim)
        return random_pieces(manifest, scaling, steps)


def _draft(checkpoint: AnyCheckpoint, config: ExportConfig, progress: Progress) -> _Draft:
    if config.calibration_data is None:
        made = assemble(checkpoint, config.output, config.precision, progress, config.targets)
        return _Draft(made)
    # Layers are ranked in TensorRT's graphs, whomever they are quantised for.
    needed = tuple(t for t in TARGETS if t == "tensorrt" or t in config.targets)
    floating = assemble(checkpoint, config.output, "fp32", progress, needed)
    progress(f"reading {config.calibration_data}")
    manifest = floating.manifest
    scaling = Affine.from_arrays(floating.arrays, "state", manifest.state_dim)
    samples = load_samples(config.calibration_data, manifest, scaling, config.calibration_steps)
    half = None
    if "tensorrt" in config.targets:
        half = assemble(checkpoint, config.output, "fp16", progress, ("tensorrt",))
    bundle, quantizations = quantize_bundle(floating, half, samples, config.targets, progress)
    return _Draft(bundle, samples, quantizations)


def _verify(
    draft: _Draft,
    checkpoint: AnyCheckpoint,
    config: ExportConfig,
    real: Sampler | None,
    progress: Progress,
) -> tuple[list[Verification], bytes, ObservationKind]:
    """The results on all observations, and reference cases from the last that they may show."""
    # In floating point both kinds compute the same, so each is proven in its half.
    both = draft.samples is None and len(config.targets) > 1
    frame = frame_of(checkpoint, run_reference(checkpoint, next(draft.noise(PIECE_STEPS))))
    verifier = Verifier(draft.bundle, checkpoint, frame, (None,) if both else config.targets)
    results: list[Verification] = []
    chooser = CaseChooser(checkpoint, frame)
    shown: ObservationKind = "random"
    try:
        for name, kind, pieces in _observations(draft, config.verify_steps, real):
            progress(f"verifying on {name} observations")
            if kind == "random" or config.real_cases:
                chooser, shown = CaseChooser(checkpoint, frame), kind
                results += verifier.verify(pieces, name, kind, chooser.consider)
            else:
                results += verifier.verify(pieces, name, kind)
    except NonFiniteError as error:
        raise VerificationError(
            f"the {config.precision} graphs overflow, nothing was published: {error}"
        ) from error
    violations = [line for result in results for line in result.violations]
    if violations:
        raise VerificationError(
            f"the {config.precision} graphs differ from the checkpoint, nothing was published: "
            + "; ".join(violations)
        )
    if not chooser.candidates:  # INT8 is not verified on noise
        for piece in draft.noise(CASES * PIECE_STEPS):
            chooser.consider(piece, run_reference(checkpoint, piece))
    moved = max(result.policy.logit_error for result in results)
    return results, chooser.choose(moved, verifier.proves).encode(), shown


def _observations(
    draft: _Draft, steps: int, real: Sampler | None
) -> Iterator[tuple[str, ObservationKind, Iterator[Piece]]]:
    """What to verify on, with its name in the report and its kind; read a piece at a time."""
    if draft.samples is None:
        yield "random", "random", draft.noise(steps)
    else:  # noise is outside the calibrated ranges
        yield "held-out", "dataset", iter(draft.samples.verification)
    if real is not None:
        yield "real", "dataset", real.pieces(steps)

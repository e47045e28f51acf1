"""Watching stage 1: are the codes used, has it converged."""

from dataclasses import replace

from vqbet_edge.training.codebooks import revive
from vqbet_edge.training.codes import CodeReport, report_codes
from vqbet_edge.training.config import ACTION_KEY
from vqbet_edge.training.run import Run

# Stage 1 is looked at so often, and has converged when so many looks did not win this share.
INTERVALS = 20
PATIENCE = 3
CONVERGED = 0.01
# Dead codes are revived in this share of stage 1; the rest lets the code books settle.
REVIVAL_SHARE = 0.7


def look_at_codes(run: Run, done: int) -> bool:
    """Report on the codes when it is time; True when stage 1 may end early."""
    total = run.config.n_vqvae_training_steps
    if done % max(1, total // INTERVALS) and done != total:
        return False
    report = _report(run)
    run.reporter.record(done, "codes", report.metrics())
    if report.error < run.progress.error * (1 - CONVERGED):
        run.progress = replace(run.progress, error=report.error, stale=0)
    else:
        run.progress = replace(run.progress, stale=run.progress.stale + 1)
    if done < REVIVAL_SHARE * total:
        revive(run.network.head.vqvae_model, run.data.chunks(run.sample()))
    converged = run.progress.stale >= PATIENCE
    if done == total and not converged:
        run.reporter.note(
            f"[yellow]stage 1 was still learning after {total} steps (error {report.error:.4f}); "
            "raise --n_vqvae_training_steps"
        )
    early = converged and run.config.vqvae_early_stop
    if done == total or early:
        run.reporter.note(_sentence(report))
    return early


def _report(run: Run) -> CodeReport:
    unit = run.scalings.unit(ACTION_KEY)
    return report_codes(run.network.head.vqvae_model, run.data.chunks(run.sample()), unit)


def _sentence(report: CodeReport) -> str:
    errors = ", ".join(f"{value:.3g}" for value in report.error_in_units)
    used, perplexity = report.used, report.perplexity
    return (
        f"codes: reconstruction error {errors} in the action's units; "
        f"{used[0]} + {used[1]} codes used, perplexity {perplexity[0]:.1f} + {perplexity[1]:.1f}, "
        f"{report.pairs} code pairs in use"
    )

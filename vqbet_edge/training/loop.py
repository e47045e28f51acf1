"""The training loop, the same for both stages."""

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from vqbet_edge.errors import VQBeTEdgeError
from vqbet_edge.training.checkpoints import Resumed
from vqbet_edge.training.run import Run
from vqbet_edge.training.stages import Stage, VqVaeStage
from vqbet_edge.training.watch import look_at_codes

if TYPE_CHECKING:
    from vqbet_edge.training.network import VQBeT


def start_stage(stage: Stage, resumed: Resumed | None, run: Run) -> None:
    """Take the stage's state from a checkpoint, if there is one of this stage."""
    for group in stage.optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if resumed is not None:
        stage.optimizer.load_state_dict(resumed.optimizer)
        if stage.averaged is not None and resumed.averaged is not None:
            stage.averaged.module.load_state_dict(resumed.averaged)
            stage.averaged.n_averaged.fill_(1)
    run.reporter.progress(run.progress.step, stage.name)


def run_stage(run: Run, stage: Stage, end: int) -> None:
    """Train one stage up to step `end` of the run."""
    config = run.config
    while run.progress.step < end:
        step = run.progress.step
        losses = _update(run, stage, step)
        done = step + 1
        run.progress = replace(run.progress, step=done)
        if done % config.log_every == 0 or done == end:
            _log(run, stage, losses)
        if stage.name == VqVaeStage.name and look_at_codes(run, done):
            end = done
        if done % config.validate_every == 0 or done == end:
            _validate(run, stage)
        stopping = _agreed(run)
        if done % config.save_every == 0 or done == end or stopping:
            if done == end and stage.name == VqVaeStage.name:
                run.progress = replace(run.progress, step=config.n_vqvae_training_steps)
            _save(run, stage)
        if stopping and done < config.steps:
            run.reporter.note(f"stopped after step {done}; go on with --resume")
            raise run.stopping or KeyboardInterrupt


def _update(run: Run, stage: Stage, step: int) -> dict[str, Tensor]:
    """One optimisation step; all that is random in it follows from seed, step and process."""
    config = run.config
    torch.manual_seed(hash((config.seed, step, run.accelerator.process_index)) % 2**63)
    rate = stage.rate(step)
    for group in stage.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate
    stage.objective.train()
    with run.accelerator.autocast():
        losses = stage.losses(run.share(run.shuffle.batch(step)))
    run.accelerator.backward(losses.loss)
    run.accelerator.clip_grad_norm_(stage.objective.parameters(), config.optimizer_grad_clip_norm)
    stage.optimizer.step()
    stage.optimizer.zero_grad()
    if stage.averaged is not None:
        stage.averaged.update_parameters(run.network)
    return losses._asdict()


def _log(run: Run, stage: Stage, losses: dict[str, Tensor]) -> None:
    means = run.accelerator.reduce(torch.stack([v.detach() for v in losses.values()]), "mean")
    metrics = dict(zip(losses, means.tolist(), strict=True))
    if not np.isfinite(metrics["loss"]):
        raise VQBeTEdgeError(
            f"the loss is {metrics['loss']} at step {run.progress.step}; lower the learning rate "
            "and go on from an earlier checkpoint with --resume"
        )
    rate = stage.optimizer.param_groups[0]["lr"]
    run.reporter.record(run.progress.step, stage.name, {**metrics, "lr": rate})
    run.reporter.progress(run.progress.step, stage.name, metrics)


@torch.no_grad()
def _validate(run: Run, stage: Stage) -> None:
    if not run.validation:
        return
    torch.manual_seed(run.config.seed)
    stage.objective.eval()
    own = stage.averaged
    current = {k: v.clone() for k, v in run.network.state_dict().items()} if own else {}
    if own is not None:
        run.network.load_state_dict(own.module.state_dict())
    with run.accelerator.autocast():
        found = [stage.losses(run.share(frames))._asdict() for frames in run.validation]
    if own is not None:
        run.network.load_state_dict(current)
    means = {name: float(torch.stack([f[name] for f in found]).mean()) for name in found[0]}
    run.reporter.record(run.progress.step, f"{stage.name} validation", means)


def _save(run: Run, stage: Stage) -> None:
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        averaged = None if stage.averaged is None else cast("VQBeT", stage.averaged.module)
        run.checkpoints.save(run.progress, run.network, averaged, stage.optimizer.state_dict())


def _agreed(run: Run) -> bool:
    """Whether any process was told to stop; all learn it at the same step."""
    if run.accelerator.num_processes == 1:
        return run.stopping is not None
    flag = torch.tensor(int(run.stopping is not None), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum"))

"""What the processes of a run say to each other, besides gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.training.config import TrainConfig

Made = TypeVar("Made")

# One process may download or decode while the others wait; NCCL would give up after ten minutes.
# Who starts the processes ends all of them when one is lost.
PATIENCE = timedelta(days=1)


def accelerate(config: TrainConfig) -> Accelerator:
    """The processes of a run.

    Raises:
        UsageError: a batch cannot be divided among them.
    """
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    # Every step has the same shapes, so that cuDNN's choice among its algorithms pays.
    torch.backends.cudnn.benchmark = True
    # The phases choose what is computed in which precision.
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[patient],
        log_with=config.log_with,
        project_dir=config.output,
    )
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.batch_size % parts:
        raise UsageError(
            f"--batch-size {config.batch_size} is not a multiple of {parts}: "
            f"{accelerator.num_processes} processes with --gradient-accumulation-steps "
            f"{config.gradient_accumulation_steps} each"
        )
    return accelerator


@contextmanager
def machine_first(accelerator: Accelerator) -> Iterator[None]:
    """The first process of every machine goes ahead.

    When it fails the others follow all the same, and learn why by themselves: accelerate's own
    `local_main_process_first` would leave them waiting.
    """
    first = accelerator.is_local_main_process
    if not first:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if first:
            accelerator.wait_for_everyone()


def from_first(accelerator: Accelerator, make: Callable[[], Made]) -> Made:
    """What the first process makes, or why it cannot, on every process."""
    found: list[Made | VQBeTEdgeError | None] = [None]
    if accelerator.is_main_process:
        try:
            found = [make()]
        except VQBeTEdgeError as error:
            found = [error]
    (made,) = broadcast_object_list(found)
    if isinstance(made, VQBeTEdgeError):
        raise made
    return cast("Made", made)


def hosts(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """The processes, for messages that no GPU is asked for; None where there is one."""
    if accelerator.num_processes == 1:
        return None
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=PATIENCE))


def any_process(told: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether any process was told, without waiting for a GPU's work."""
    if group is None:
        return told
    flag = torch.tensor(int(told))
    dist.all_reduce(flag, group=group)
    return bool(flag)


def batch_norm_advice(config: TrainConfig, accelerator: Accelerator) -> str:
    """What to say about BatchNorm, which sees a part of a batch at a time; empty without it."""
    parts = accelerator.num_processes * config.gradient_accumulation_steps
    if config.use_group_norm or parts == 1:
        return ""
    return (
        f"BatchNorm takes the {config.batch_size // parts} windows that are computed at once, not "
        f"the batch of {config.batch_size}: the losses are not those of one process; with "
        "--use-group-norm they are"
    )

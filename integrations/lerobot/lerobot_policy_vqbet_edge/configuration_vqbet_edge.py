"""The options of the runtime as LeRobot's configuration: `--policy.temperature=0`."""

from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import msgspec
from draccus.parsers.decoding import decode
from lerobot.configs.policies import PreTrainedConfig

from vqbet_edge import Guards
from vqbet_edge.errors import UsageError

NO_TRAINING = (
    "a bundle acts and cannot be trained: train the checkpoint with --policy.type=vqbet, then "
    "export it again with vqbet-export"
)


@decode.register(Guards)
def _decode_guards(raw: Any, path: Any = ()) -> Guards:  # noqa: ARG001
    """`--policy.guards='{"max_change": 5}'`: the fields of `vqbet_edge.Guards`, as JSON."""
    known = [field.name for field in fields(Guards)]
    try:
        unknown = sorted(msgspec.convert(raw, dict[str, Any]).keys() - set(known))
        guards = msgspec.convert(raw, Guards)
    except msgspec.ValidationError as error:
        unknown, guards = [str(error)], None
    if unknown or guards is None:
        raise UsageError(
            f"--policy.guards: expected JSON such as '{{\"max_change\": 5}}' with some of "
            f"{', '.join(known)}; got {raw!r} ({', '.join(unknown)})"
        )
    return guards


@PreTrainedConfig.register_subclass("vqbet_edge")
@dataclass
class VqbetEdgeConfig(PreTrainedConfig):
    """How LeRobot runs a bundle.

    The features come from the bundle's own `config.json`; `vqbet_edge.EdgePolicy.load` explains the
    options.

    Raises:
        UsageError: a device that is not the CPU, or AMP.
    """

    device: str | None = "cpu"
    # Who runs the graphs: auto, onnxruntime, onnxruntime-cuda or tensorrt.
    backend: str = "auto"
    # Codes of row r of a batch are drawn from a sequence that starts at seed + r.
    seed: int = 0
    # Of the code distribution; 0 is greedy, by default the checkpoint's.
    temperature: float | None = None
    # Predict a new chunk after so many actions; by default whole chunks are executed.
    replan_every: int | None = None
    # Where work is done ahead of the next prediction: thread, inline or off.
    prefetch: str | None = None
    # JSON: '{"action_limits": [-90, 90], "max_change": 5, "deadline_s": 0.03, "on_late": "hold"}'.
    guards: Guards = field(default_factory=Guards)

    def __post_init__(self) -> None:
        """Keep LeRobot's tensors on the CPU."""
        self.device = self.device or "cpu"
        if self.device != "cpu":
            raise UsageError(
                f"expected --policy.device=cpu, got {self.device}: LeRobot's tensors stay on the "
                "CPU, and what computes the actions is chosen with --policy.backend"
            )
        if self.use_amp:
            raise UsageError(
                "--policy.use_amp has no effect on compiled graphs; leave it out, and choose the "
                "precision with vqbet-export --fp16 or --int8"
            )
        super().__post_init__()

    @property
    def observation_delta_indices(self) -> None:
        """None: the policy keeps its history itself."""

    @property
    def action_delta_indices(self) -> None:
        """None: nothing is trained."""

    @property
    def reward_delta_indices(self) -> None:
        """None: nothing is trained."""

    def validate_features(self) -> None:
        """Nothing to do: the policy compares them with the bundle's manifest."""

    def get_optimizer_preset(self) -> NoReturn:
        """Raises UsageError: LeRobot asks for it before it trains."""
        raise UsageError(NO_TRAINING)

    def get_scheduler_preset(self) -> NoReturn:
        """Raises UsageError: LeRobot asks for it before it trains."""
        raise UsageError(NO_TRAINING)

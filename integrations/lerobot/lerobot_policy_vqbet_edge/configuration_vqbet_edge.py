"""The options of the runtime as LeRobot's configuration: `--policy.temperature=0`."""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from draccus.parsers.decoding import decode
from lerobot.configs.policies import PreTrainedConfig

from vqbet_edge import Guards
from vqbet_edge.errors import BundleError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.hub import is_hub_id, local_bundle
from vqbet_edge.runtime.lerobot_files import CONFIG_NAME, LEROBOT_NAMES, read_license

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

    LeRobot parses `config.json`, then sets `pretrained_path`, and reads processors and weights from
    there. Setting it is where a bundle is verified, and a repository on the Hub pinned: the path is
    from then on a directory on this machine whose every file is the exported one.

    Raises:
        UsageError: a device that is not the CPU, AMP, or what no configuration may say itself.
        BundleError: `pretrained_path` is set to what is no bundle.
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
    # Act the bundle's reference cases out first, which takes about a second.
    prove: bool = False
    # The first action after a reset, also where an operator hands back, is at most the guards'
    # max_change from the measured state. For arms whose state and action are the same joints, in
    # the same order and units.
    start_from_state: bool = False
    # New folder to record to, with decisions: the newest of it, in row_0 and on for a batch's rows.
    record: str | None = None
    # Of each row's recording.
    record_max_bytes: int = 1 << 30
    # Of a repository on the Hub: a branch, tag or commit. LeRobot 0.4.4 lacks it.
    pretrained_revision: str | None = None
    _made = False

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
        if self.use_peft or self.pretrained_path is not None:
            raise UsageError(
                "expected neither use_peft nor pretrained_path of a bundle's configuration; name "
                "the bundle with --policy.path=NAME.bundle"
            )
        if self.start_from_state and self.guards.max_change is None:
            raise UsageError(
                "--policy.start_from_state limits the first action by the guards' max_change, "
                "which is not set: add --policy.guards='{\"max_change\": 5}'"
            )
        super().__post_init__()
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Verify and pin what `pretrained_path` is set to."""
        if name == "pretrained_path" and self._made and value is not None:
            value = _verified(str(value), self.pretrained_revision)
            self.pretrained_revision = None
        super().__setattr__(name, value)

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


def _verified(source: str, revision: str | None) -> Path:
    """The directory of a bundle that is what was exported, LeRobot's three files included.

    Raises:
        BundleError: it is none.
    """
    if not os.path.lexists(source) and is_hub_id(source):
        _check_what_was_read(source, revision)
    path = local_bundle(source, revision)
    bundle = Bundle.open(path)
    missing = sorted(set(LEROBOT_NAMES) - bundle.manifest.files.keys())
    if missing:
        raise BundleError(
            f"'{path}' lacks {', '.join(missing)} for LeRobot; export its checkpoint again: "
            "vqbet-export model.safetensors --force"
        )
    return path


def _check_what_was_read(name: str, revision: str | None) -> None:
    """Raise BundleError if LeRobot has just parsed a `config.json` that sets more than a bundle's.

    It asked the Hub before us, and some of its commands ask for the main branch whatever the
    revision: what it got is in the client's cache.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - a directory does without

    for each in (None, revision):
        found = try_to_load_from_cache(name, CONFIG_NAME, revision=each)
        if isinstance(found, str):
            read_license(Path(found).read_bytes())

"""The policies compared, each behind the same methods."""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vqbet_bench.observations import Observations
from vqbet_edge import EdgePolicy, __version__
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.backends.base import Backend, Prefetch
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cameras import unpack_frames

PolicyKind = Literal["bundle", "lerobot"]
BundleBackend = BackendName | Literal["tensorrt_rtx"]


@dataclass(frozen=True)
class Job:
    """What to load.

    Attributes:
        kind: a bundle, or LeRobot's policy.
        path: bundle or checkpoint.
        observations: what it acts on.
        chunk: actions between two predictions.
        threads: processors that it may use.
        backend: of a bundle.
        prefetch: of a bundle; None is the backend's default.
        record: where a bundle's decisions are recorded while it acts; None does not.
        device: "cpu" or "cuda", of LeRobot.
    """

    kind: PolicyKind
    path: str
    observations: Observations
    chunk: int
    threads: int
    backend: BundleBackend = "auto"
    prefetch: Prefetch | None = None
    record: Path | None = None
    device: str = "cpu"


class Policy(ABC):
    """What the benchmark asks of a policy.

    Attributes:
        chunk: actions between two predictions.
        details: backend, precision, versions.
    """

    chunk: int
    details: dict[str, str]

    @abstractmethod
    def start(self, *, every: bool) -> None:
        """Forget the history; from now on predict on every step, or once per chunk."""

    @abstractmethod
    def prepare(self, step: int) -> Any:
        """The observation of a step as this policy takes it; not timed."""

    @abstractmethod
    def act(self, observation: Any) -> Any:
        """One step of the control loop; timed. Returns the action."""

    def stages(self) -> dict[str, float]:
        """Stage -> seconds in the latest prediction; empty when it does not tell."""
        return {}

    def recorded(self) -> AbstractContextManager[None]:
        """While a round is played."""
        return nullcontext()


class MeasuredBundle(Policy):
    """`EdgePolicy`: `act` with checks, normalisation and un-normalisation included."""

    def __init__(self, job: Job) -> None:
        bundle = Bundle.open(job.path)
        self._job, self._backend = job, _create_backend(job.backend, bundle)
        self._bundle = bundle.without_graphs()
        self.chunk, self._every = job.chunk, False
        self._policy = self._create()
        self.details = {
            "backend": self._backend.name,
            "prefetch": job.prefetch or self._backend.default_prefetch,
            "precision": ", ".join(bundle.manifest.precisions),
            "vqbet_edge": __version__,
        }

    def _create(self) -> EdgePolicy:
        return EdgePolicy(
            self._bundle,
            self._backend,
            replan_every=1 if self._every else self.chunk,
            prefetch=self._job.prefetch,
        )

    def start(self, *, every: bool) -> None:
        """A new window on the same weights where the way of re-planning changes."""
        if every != self._every:
            self._every = every
            self._policy = self._create()
        self._policy.reset()

    def prepare(self, step: int) -> Any:
        """uint8 (H, W, 3) and float32 (S,) in the robot's units."""
        return self._job.observations[step]

    def act(self, observation: Any) -> Any:
        """`EdgePolicy.act`."""
        return self._policy.act(observation)

    def stages(self) -> dict[str, float]:
        """What `EdgePolicy.last` says."""
        return {} if self._policy.last is None else self._policy.last.seconds

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record decisions, where the job says so."""
        if self._job.record is None:
            yield
            return
        with (
            TemporaryDirectory(prefix="vqbet-bench-", dir=self._job.record) as folder,
            self._policy.record(folder, decisions=True),
        ):
            yield

    def stage_launches(self) -> dict[str, Callable[[], object]]:
        """Stage -> a call that runs it alone, of backends that run all stages in one launch."""
        launches = getattr(self._backend.create_window(), "stage_launches", dict)
        return dict(launches())

    def sibling(self, seed: int) -> EdgePolicy:
        """The policy of one more robot on the same weights."""
        return self._policy.sibling(seed=seed)


class LeRobot(Policy):
    """LeRobot's policy between its processors, in eager PyTorch: what its own commands call."""

    def __init__(self, job: Job) -> None:
        import torch  # noqa: PLC0415
        from lerobot.configs.policies import PreTrainedConfig  # noqa: PLC0415
        from lerobot.policies.factory import (  # noqa: PLC0415
            get_policy_class,
            make_pre_post_processors,
        )

        torch.set_num_threads(job.threads)
        self._torch, self._observations = torch, job.observations
        config = PreTrainedConfig.from_pretrained(job.path)
        config.device = job.device
        policy_class = get_policy_class(config.type)
        self._policy: Any = policy_class.from_pretrained(job.path, config=config).eval()
        self._before, self._after = make_pre_post_processors(
            config,
            pretrained_path=job.path,
            preprocessor_overrides={"device_processor": {"device": job.device}},
        )
        self.chunk, self._every = job.chunk, False
        self._policy.reset()
        self.details = _versions("lerobot", "torch")

    def start(self, *, every: bool) -> None:
        """Clears LeRobot's own queues."""
        self._every = every
        self._policy.reset()

    def prepare(self, step: int) -> Any:
        """float32 (3, H, W) in [0, 1] and states (S,) in the robot's units, on the CPU."""
        if self._every:
            self._policy._queues["action"].clear()  # noqa: SLF001 - when empty, LeRobot re-plans
        kept, row = self._observations, step % len(self._observations)
        frames = unpack_frames(kept.frames[row], kept.image_shapes)
        images = {key: self._image(frame) for key, frame in frames.items()}
        return {**images, kept.state_key: self._torch.from_numpy(kept.states[row].copy())}

    def _image(self, frame: NDArray[np.uint8]) -> Any:
        return self._torch.from_numpy(frame).permute(2, 0, 1).float() / 255

    def act(self, observation: Any) -> Any:
        """Preprocessor, `select_action`, postprocessor: float32 (1, A) in the robot's units."""
        with self._torch.inference_mode():
            return self._after(self._policy.select_action(self._before(observation)))


def load_policy(job: Job) -> Policy:
    """Load the policy that a job names."""
    return MeasuredBundle(job) if job.kind == "bundle" else LeRobot(job)


def _create_backend(name: BundleBackend, bundle: Bundle) -> Backend:
    """As `EdgePolicy.load` does, and TensorRT for RTX, which it takes no name for."""
    if name == "tensorrt_rtx":
        from vqbet_edge.runtime.backends.tensorrt import TensorRTBackend  # noqa: PLC0415
        from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt  # noqa: PLC0415

        return TensorRTBackend(bundle, tensorrt=import_tensorrt("tensorrt_rtx"))
    return create_backend(name, bundle)


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}

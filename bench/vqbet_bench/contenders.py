"""Policies to compare, each behind the same methods and in a process of its own."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vqbet_bench.messages import ContenderKind, EdgeBackend, Job
from vqbet_bench.observations import Pool

if TYPE_CHECKING:
    from vqbet_edge.runtime.backends.base import Backend
    from vqbet_edge.runtime.bundle import Bundle


class Contender(Protocol):
    """What the benchmark asks of a policy."""

    chunk: int
    details: dict[str, str]

    def start(self, *, every: bool) -> None:
        """Forget the history; from now on re-plan on every step, or once per chunk."""

    def prepare(self, step: int) -> Any:
        """The observation of a step as this policy takes it; not timed."""

    def act(self, observation: Any) -> Any:
        """One step of the control loop; timed. Returns the action."""

    def stages(self) -> dict[str, float]:
        """Stage -> seconds in the latest prediction; empty when it does not tell."""

    def stage_launches(self) -> dict[str, Callable[[], object]]:
        """Stage -> a call that runs it alone; empty when `stages` tells."""


class Edge:
    """`EdgePolicy`: `act` with checks, normalisation and un-normalisation included."""

    def __init__(self, job: Job, pool: Pool) -> None:
        self._job, self._pool = job, pool
        self.chunk = job.chunk
        self._every = False
        self._load(every=False)
        from vqbet_edge import __version__  # noqa: PLC0415

        manifest = self._policy.manifest
        self.details = {
            "backend": self._backend.name,
            "idle": self._job.idle or self._backend.default_idle,
            "precision": ", ".join(sorted({s.precision for s in manifest.stages.values()})),
            "vqbet_edge": __version__,
        }

    def _load(self, *, every: bool) -> None:
        from vqbet_edge.runtime.bundle import Bundle  # noqa: PLC0415 - part of what start-up takes
        from vqbet_edge.runtime.policy import EdgePolicy  # noqa: PLC0415

        bundle = Bundle.open(self._job.path)
        self._backend = create_edge_backend(self._job.backend, bundle)
        replan_every = 1 if every else self.chunk
        self._policy = EdgePolicy(
            bundle, self._backend, replan_every=replan_every, idle=self._job.idle
        )

    def start(self, *, every: bool) -> None:
        """Loads again where the two ways of re-planning change: a policy has one."""
        if every != self._every:
            del self._policy, self._backend
            self._load(every=every)
            self._every = every
        self._policy.reset()

    def prepare(self, step: int) -> Any:
        """uint8 (H, W, 3) and float32 (S,) in the robot's units."""
        return self._pool.observation(step)

    def act(self, observation: Any) -> Any:
        """`EdgePolicy.act`."""
        return self._policy.act(observation)

    def stages(self) -> dict[str, float]:
        """What `EdgePolicy.last` says."""
        return {} if self._policy.last is None else self._policy.last.seconds

    def stage_launches(self) -> dict[str, Callable[[], object]]:
        """Of backends that run all stages in one launch."""
        launches = getattr(self._backend, "stage_launches", None)
        return {} if launches is None else {str(k): v for k, v in launches().items()}


def create_edge_backend(name: EdgeBackend, bundle: "Bundle") -> "Backend":
    """As `vqbet_edge` does, and TensorRT for RTX, which it takes no name for."""
    if name == "tensorrt_rtx":
        from vqbet_edge.runtime.backends.tensorrt import TensorRTBackend  # noqa: PLC0415
        from vqbet_edge.runtime.backends.tensorrt_module import import_tensorrt  # noqa: PLC0415

        return TensorRTBackend(bundle, tensorrt=import_tensorrt("tensorrt_rtx"))
    from vqbet_edge.runtime.backends import create_backend  # noqa: PLC0415

    return create_backend(name, bundle)


class _NoStages:
    """A policy that does not tell where its time goes."""

    def stages(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def stage_launches(self) -> dict[str, Callable[[], object]]:
        """Nothing."""
        return {}


class LeRobot(_NoStages):
    """LeRobot's `select_action`, eager or with its network compiled.

    Its processors (normalisation, batch axis, float conversion) are left out of the time, which
    favours it: `EdgePolicy.act` does that work inside.
    """

    def __init__(self, job: Job, pool: Pool) -> None:
        import torch  # noqa: PLC0415
        from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy  # noqa: PLC0415

        torch.set_num_threads(job.threads)
        self._torch, self._pool, self._device = torch, pool, torch.device(job.device)
        self._policy: Any = VQBeTPolicy.from_pretrained(job.path).eval().to(self._device)
        if job.kind == "lerobot-compile":
            self._policy.vqbet = torch.compile(self._policy.vqbet)
        self.chunk, self._every = job.chunk, False
        self._policy.reset()
        self.details = _versions("lerobot", "torch")

    def start(self, *, every: bool) -> None:
        """Clears LeRobot's own queues."""
        self._every = every
        self._policy.reset()

    def prepare(self, step: int) -> Any:
        """float32 (1, 3, H, W) in [0, 1] and normalised states (1, S), on the CPU."""
        if self._every:
            self._policy._queues["action"].clear()  # noqa: SLF001 - when empty, LeRobot re-plans
        observation, row = self._pool.observation(step), step % len(self._pool.states)
        batch = {k: _to_image(self._torch, observation[k])[None] for k in self._pool.images}
        state = self._torch.from_numpy(self._pool.normalized_states[row].copy())
        return {**batch, self._pool.state_key: state[None]}

    def act(self, observation: Any) -> Any:
        """`select_action`, upload and download included."""
        with self._torch.inference_mode():
            batch = {key: value.to(self._device) for key, value in observation.items()}
            return self._policy.select_action(batch).cpu()


class _Windowed(_NoStages):
    """A window of whole observations and a queue of actions around one call per chunk."""

    details: dict[str, str]

    def __init__(self, job: Job, pool: Pool) -> None:
        from collections import deque  # noqa: PLC0415

        import numpy as np  # noqa: PLC0415

        self._np, self._pool = np, pool
        self.chunk, self._window, self._every = job.chunk, job.window, False
        self._images: Any = deque(maxlen=self._window)
        self._states: Any = deque(maxlen=self._window)
        self._queue: Any = deque()

    def start(self, *, every: bool) -> None:
        """An empty window and queue."""
        self._every = every
        for kept in (self._images, self._states, self._queue):
            kept.clear()

    def prepare(self, step: int) -> Any:
        """float32 (K, 3, H, W) in [0, 1] and (S,) in the robot's units."""
        np, row = self._np, step % len(self._pool.states)
        frames = np.stack([images[row] for images in self._pool.images.values()])
        return np.moveaxis(frames, -1, 1).astype(np.float32) / 255, self._pool.states[row]

    def act(self, observation: Any) -> Any:
        """The next action; predicts from the whole window when there is none."""
        images, states = observation
        repeats = 1 if self._images else self._window
        self._images.extend([images] * repeats)
        self._states.extend([states] * repeats)
        if self._every or not self._queue:
            self._queue.clear()
            window = (self._np.stack(list(kept))[None] for kept in (self._images, self._states))
            chunks = self._predict(*window)
            self._queue.extend(chunks[self._window - 1])
        return self._queue.popleft()

    def _predict(self, images: Any, states: Any) -> Any:
        """(1, N, K, 3, H, W) and (1, N, S) -> chunks of all queries (Q, W, A)."""
        raise NotImplementedError


class Network(_Windowed):
    """This package's network in eager PyTorch, with every token and all frames."""

    def __init__(self, job: Job, pool: Pool) -> None:
        import torch  # noqa: PLC0415

        from vqbet_bench.whole_policy import WholePolicy  # noqa: PLC0415

        super().__init__(job, pool)
        torch.set_num_threads(job.threads)
        self._torch, self._device = torch, torch.device(job.device)
        self._module = WholePolicy.load(job.path).to(self._device)
        self.details = _versions("torch")

    def _predict(self, images: Any, states: Any) -> Any:
        with self._torch.inference_mode():
            tensors = (self._torch.from_numpy(x).to(self._device) for x in (images, states))
            return self._module(*tensors).cpu().numpy()


class SingleGraph(_Windowed):
    """What a plain export gives: one ONNX graph, every token, all frames; in ONNX Runtime."""

    def __init__(self, job: Job, pool: Pool) -> None:
        import onnxruntime  # noqa: PLC0415

        super().__init__(job, pool)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        self._session = onnxruntime.InferenceSession(
            Path(job.path).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        self.details = _versions("onnxruntime")

    def _predict(self, images: Any, states: Any) -> Any:
        return self._session.run(None, {"images": images, "states": states})[0]


def create_contender(job: Job, pool: Pool) -> Contender:
    """Load the policy that a job names."""
    kinds: dict[ContenderKind, Callable[[Job, Pool], Contender]] = {
        "edge": Edge,
        "lerobot": LeRobot,
        "lerobot-compile": LeRobot,
        "network": Network,
        "single-graph": SingleGraph,
    }
    return kinds[job.kind](job, pool)


def _to_image(torch: Any, frame: Any) -> Any:
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}

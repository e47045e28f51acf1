"""Policies as the evaluation drives them: a slot per environment that runs at the same time."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.backends import BackendName
from vqbet_edge.runtime.backends.base import HeadOutputs
from vqbet_edge.runtime.cameras import pack_frames
from vqbet_edge.runtime.guards import Guards
from vqbet_edge.runtime.hub import is_bundle
from vqbet_edge.runtime.sampling import Choice, CodeSampler
from vqbet_edge.training.checkpoint import Checkpoint, load_checkpoint
from vqbet_edge.training.config import STATE_KEY
from vqbet_edge.training.objectives import PixelScaling

Floats = npt.NDArray[np.float32]
Observations = Mapping[str, npt.NDArray[Any]]  # a leading axis of slots


@dataclass(frozen=True)
class ActorOptions:
    """How a policy is driven.

    Attributes:
        backend: who runs a bundle.
        temperature: of the code distribution; None takes the policy's, 0 is greedy.
        replan_every: predict anew after so many actions; None executes whole chunks.
    """

    backend: BackendName = "auto"
    temperature: float | None = None
    replan_every: int | None = None


class Actor(Protocol):
    """One policy, driving several environments at once."""

    def reset(self, slot: int, seed: int) -> None:
        """Begin an episode in a slot."""

    def act(self, observations: Observations) -> Floats:
        """Actions (slots, A) for observations with a leading axis of slots."""


def load_actor(source: str, slots: int, options: ActorOptions) -> Actor:
    """A bundle or a checkpoint, by what is there.

    Raises:
        CheckpointError: it is neither, or not whole.
        BundleError: the bundle is not whole.
    """
    if is_bundle(source):
        return BundleActor.load(source, slots, options)
    return TorchActor(load_checkpoint(source), slots, options)


class BundleActor:
    """A bundle on any backend; every slot has a policy of its own, on the same weights."""

    def __init__(self, policies: Sequence[EdgePolicy]) -> None:
        #: One per slot.
        self.policies = policies

    @classmethod
    def load(cls, source: str, slots: int, options: ActorOptions) -> "BundleActor":
        """Open a bundle once for all slots."""
        policy = EdgePolicy.load(
            source,
            options.backend,
            temperature=options.temperature,
            replan_every=options.replan_every,
            guards=Guards(action_limits=None),  # a checkpoint to compare with has none
        )
        return cls([policy, *(policy.sibling() for _ in range(slots - 1))])

    def reset(self, slot: int, seed: int) -> None:
        """See `Actor`."""
        self.policies[slot].reset(seed)

    def act(self, observations: Observations) -> Floats:
        """See `Actor`."""
        rows = [{k: v[i] for k, v in observations.items()} for i in range(len(self.policies))]
        actions = [p.act(row) for p, row in zip(self.policies, rows, strict=True)]
        return np.stack(actions)


class _Slot:
    """What one environment has seen, and the actions it still has to execute."""

    def __init__(self, n_obs_steps: int, sampler: CodeSampler) -> None:
        self.seen: deque[tuple[Tensor, Tensor]] = deque(maxlen=n_obs_steps)
        self.actions: deque[Floats] = deque()
        self.sampler = sampler

    def reset(self, seed: int) -> None:
        self.seen.clear()
        self.actions.clear()
        self.sampler.reseed(seed)

    def see(self, images: Tensor, state: Tensor) -> None:
        # The first observation fills the window, as in LeRobot's `populate_queues`.
        self.seen.extend([(images, state)] * (1 if self.seen else self.seen.maxlen or 1))


class TorchActor:
    """A checkpoint in PyTorch; draws codes from the same random sequence as a bundle does."""

    def __init__(self, checkpoint: Checkpoint, slots: int, options: ActorOptions) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = checkpoint.network.to(self._device)
        self._dtype = next(self._network.parameters()).dtype
        self._config = config = checkpoint.config
        self.image_keys = list(checkpoint.image_shapes)
        self.state_key = checkpoint.state_key
        pixels = PixelScaling([checkpoint.inputs[key] for key in config.image_keys])
        self._pixels = pixels.to(self._device, self._dtype)
        self._state, self._scaling = checkpoint.inputs[STATE_KEY], checkpoint.action_scaling
        self._replan_every = options.replan_every or config.action_chunk_size
        trained = config.bet_softmax_temperature
        temperature = trained if options.temperature is None else options.temperature
        columns = self._network.head.secondary_columns
        added = None if columns is None else columns.cpu().numpy()
        self._slots = [
            _Slot(config.n_obs_steps, CodeSampler(temperature, trained, added, 0))
            for _ in range(slots)
        ]

    def reset(self, slot: int, seed: int) -> None:
        """See `Actor`."""
        self._slots[slot].reset(seed)

    def act(self, observations: Observations) -> Floats:
        """See `Actor`."""
        self.see(observations)
        empty = [index for index, slot in enumerate(self._slots) if not slot.actions]
        if empty:
            self._plan(empty)
        return np.stack([slot.actions.popleft() for slot in self._slots])

    def see(self, observations: Observations) -> None:
        """Take observations into the windows."""
        images = pack_frames([observations[key] for key in self.image_keys])
        states = observations[self.state_key].astype(np.float32)
        self._state.apply(states, out=states)
        rows = zip(torch.from_numpy(images), torch.from_numpy(states), strict=True)
        for slot, (frames, state) in zip(self._slots, rows, strict=True):
            slot.see(frames, state)  # (K, H, W, 3) and (S,)

    def _plan(self, slots: Sequence[int]) -> None:
        chunks = self.scaled(self.chunks(self.features(slots), slots), slots)
        for index, chunk in zip(slots, chunks, strict=True):
            self._slots[index].actions.extend(chunk[: self._replan_every])

    def scaled(self, chunks: Floats, slots: Sequence[int]) -> Floats:
        """(B, W, A), normalised, of the slots' current steps -> in the robot's units."""
        states = np.stack([self._slots[index].seen[-1][1].numpy() for index in slots])
        return self._scaling.apply(chunks, states, out=chunks)

    @torch.no_grad()
    def features(self, slots: Sequence[int]) -> Tensor:
        """(B, D): of the current step."""
        windows = [self._slots[index].seen for index in slots]
        images = torch.stack([torch.stack([i for i, _ in seen]) for seen in windows])
        states = torch.stack([torch.stack([s for _, s in seen]) for seen in windows])
        pixels = self._pixels(images.to(self._device))  # (B, N, K, 3, H, W)
        features = self._network(pixels, states.to(self._device, self._dtype))
        current: Tensor = features[:, self._config.n_obs_steps - 1]
        return current

    def chunks(self, features: Tensor, slots: Sequence[int]) -> Floats:
        """(B, D) of the current step -> (B, W, A), normalised."""
        return self.decode(features, self.choose(features, slots))

    @torch.no_grad()
    def choose(
        self, features: Tensor, slots: Sequence[int], draws: npt.NDArray[np.float64] | None = None
    ) -> list[Choice]:
        """Code pairs for features (B, D), drawn anew or with random numbers (2,) of before."""
        head = self._network.head
        logits, offsets = head.code_logits(features).cpu().numpy(), head.offsets(features).cpu()
        outputs = map(HeadOutputs, logits, offsets.numpy())
        pairs = zip(slots, outputs, strict=True)
        return [self._slots[i].sampler.choose(o, draws=draws) for i, o in pairs]

    @torch.no_grad()
    def decode(self, features: Tensor, choices: Sequence[Choice]) -> Floats:
        """(B, D) and a code pair for each -> chunks (B, W, A), normalised."""
        codes = torch.from_numpy(np.stack([choice.codes for choice in choices]))
        chunks = self._network.head.action_chunk(features, codes.to(self._device))
        decoded: Floats = chunks.cpu().numpy()
        return decoded

"""The newest message of every topic, and when together they are an observation."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vqbet_edge import ObservationError

Cause = Literal["missing", "stale", "skewed", "repeated", "invalid", "conflict", "late"]


@dataclass(frozen=True)
class Observed:
    """An observation that may be acted on.

    Attributes:
        values: as `EdgePolicy.act` takes it.
        newest, oldest: when these parts of it were taken, in seconds of `time.monotonic()`.
        repeated: topics whose part was in the observation before too.
    """

    values: dict[str, Any]
    newest: float
    oldest: float
    repeated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why there is no observation now: what is counted, and the reason for a person."""

    cause: Cause
    reason: str

    @property
    def stops(self) -> bool:
        """Whether the robot stops at once; otherwise when it lasts."""
        return self.cause in {"missing", "stale", "conflict", "late"}


class _Sample(NamedTuple):
    message: Any
    taken: float


class Input:
    """The newest message of one topic; `kind` is what it is a message of.

    Messages are offered by one thread and read by another; both see a sample whole.
    """

    def __init__(
        self, name: str, decode: Callable[[Any], Any], max_age: float, kind: str = "joint_state"
    ) -> None:
        self.name, self.kind = name, kind
        self._decode, self._max_age = decode, max_age
        self.clear()

    def clear(self) -> None:
        """Forget what came."""
        self._newest: _Sample | None = None
        self._dropped = ""
        self._used, self.repeats = float("-inf"), 0

    def offer(self, message: Any, taken: float, now: float) -> None:
        """A message, and when it was taken; one that is older than another is dropped."""
        newest = self._newest
        if now - taken > self._max_age:
            self._dropped = f"; the latest message was {now - taken:.3f} s old when it came"
        elif newest is not None and taken < newest.taken:
            self._dropped = "; the latest message came out of order"
        else:
            self._newest, self._dropped = _Sample(message, taken), ""

    def drop(self, reason: str) -> None:
        """A message whose time is not known."""
        self._dropped = f"; of the latest message {reason}"

    def check(self, now: float) -> _Sample | Refusal:
        """The newest message, if it is young enough."""
        newest = self._newest
        if newest is None:
            return Refusal("missing", f"'{self.name}': no message came{self._dropped}")
        if now - newest.taken > self._max_age:
            return Refusal(
                "stale",
                f"'{self.name}': the newest message is {now - newest.taken:.3f} s old, expected "
                f"{self._max_age} s at most{self._dropped}",
            )
        return newest

    def repeats_with(self, sample: _Sample) -> int:
        """How often the message will have been used again, if it is used now."""
        return self.repeats + 1 if sample.taken == self._used else 0

    def use(self, sample: _Sample) -> None:
        """The message is part of an observation."""
        self.repeats, self._used = self.repeats_with(sample), sample.taken

    def decode(self, sample: _Sample) -> Any:
        """What the policy sees of it.

        Raises:
            ObservationError: it is not as expected.
        """
        try:
            return self._decode(sample.message)
        except ObservationError as error:
            raise ObservationError(f"'{self.name}': {error}") from error


class Inputs:
    """All topics of a policy.

    Args:
        inputs: feature of the policy, or part of one -> its topic.
        max_skew: most that the times of an observation's parts may differ.
        max_repeats: how often in a row a part may be used again, beside parts that are new.
        join: makes features of what is read, where parts are no features.
    """

    def __init__(
        self,
        inputs: Mapping[str, Input],
        max_skew: float,
        max_repeats: int,
        join: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self._inputs, self._max_skew, self._max_repeats = dict(inputs), max_skew, max_repeats
        self._join = join
        self._latest = float("-inf")
        self.conflict = ""

    def clear(self) -> None:
        """Forget what came."""
        self._latest, self.conflict = float("-inf"), ""
        for each in self._inputs.values():
            each.clear()

    def observe(self, now: float) -> Observed | Refusal:
        """The newest of each; an observation is given once."""
        if self.conflict:
            return Refusal("conflict", self.conflict)
        samples: dict[str, _Sample] = {}
        for key, each in self._inputs.items():
            match each.check(now):
                case Refusal() as refusal:
                    return refusal
                case sample:
                    samples[key] = sample
        unfit = self._compare(samples, now)
        if unfit is not None:
            return unfit
        try:
            values = {key: self._inputs[key].decode(each) for key, each in samples.items()}
        except ObservationError as error:
            return Refusal("invalid", str(error))
        for key, sample in samples.items():
            self._inputs[key].use(sample)
        times = [sample.taken for sample in samples.values()]
        self._latest = max(times)
        repeated = tuple(each.name for each in self._inputs.values() if each.repeats)
        return Observed(self._join(values), max(times), min(times), repeated)

    def _compare(self, samples: Mapping[str, _Sample], now: float) -> Refusal | None:
        """Why the samples are no observation together, or not another one."""
        times = [sample.taken for sample in samples.values()]
        if max(times) - min(times) > self._max_skew:
            apart = {self._inputs[key].name: now - each.taken for key, each in samples.items()}
            return Refusal("skewed", f"further apart than {self._max_skew} s; ages: {apart}")
        if max(times) <= self._latest:
            return Refusal("repeated", "nothing new came since the last step")
        for key, sample in samples.items():
            if self._inputs[key].repeats_with(sample) > self._max_repeats:
                return Refusal(
                    "repeated",
                    f"'{self._inputs[key].name}': nothing new came for {self._max_repeats + 1} "
                    "steps; its rate is below the policy's, or raise max_repeats",
                )
        return None


def conflicts(publishers: Mapping[str, int], commands: Collection[str]) -> str:
    """Who publishes where nobody should; empty: nobody.

    Args:
        publishers: topic -> how many publish it, this node included.
        commands: the topics of commands.
    """
    for topic, count in publishers.items():
        if count > 1:
            who = "another node sends commands" if topic in commands else "its messages are mixed"
            return f"'{topic}' has {count} publishers, expected 1: {who}; stop one of them"
    return ""

"""A robot with the unmodified openpi-client; runs in an environment of its own, with NumPy 1.

python openpi_peer.py openpi|roboarena URL SIDE

Reads from stdin a byte that says what follows, and writes actions to stdout.

a: an observation, uint8 (SIDE, SIDE, 3) and float32 (2,)
f: a line of JSON, key -> shape: the next observation has uint8 frames of it too
r: a reset

An error is written as the size of its text, as a negative float32, and the text. RoboArena's client
is openpi's with an endpoint and an id in every request; `msgpack_numpy` packs as the package of
that name does.
"""

import json
import sys
from typing import Any

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy


class RoboArena(WebsocketClientPolicy):  # type: ignore[misc] # not installed where mypy runs
    """Names the endpoint; the answer is the action alone."""

    def infer(self, obs: Any) -> Any:
        return {"actions": super().infer({**obs, "endpoint": "infer", "session_id": "arm-1"})}

    def reset(self) -> None:
        self._ws.send(msgpack_numpy.packb({"endpoint": "reset", "session_id": "arm-1"}))
        assert self._ws.recv() == "reset successful"


class MsgpackNumpy(WebsocketClientPolicy):  # type: ignore[misc]
    """Another dialect on the same wire."""

    def __init__(self, url: str) -> None:
        import msgpack
        import msgpack_numpy as dialect

        super().__init__(url)
        self._packer = msgpack.Packer(default=dialect.encode)


KINDS = {
    "openpi": WebsocketClientPolicy,
    "roboarena": RoboArena,
    "msgpack_numpy": MsgpackNumpy,
}


def main(kind: str, url: str, side: int) -> None:
    client = KINDS[kind](url)
    assert np.__version__.startswith("1.")
    assert client.get_server_metadata()["query"] == "every_step"
    further: dict[str, Any] = {}
    while what := sys.stdin.buffer.read(1):
        if what == b"r":
            client.reset()
            sys.stdout.buffer.write(b"r")
        elif what == b"f":
            shapes = json.loads(sys.stdin.buffer.readline())
            further = {key: np.zeros(shape, np.uint8) for key, shape in shapes.items()}
        else:
            image = np.frombuffer(sys.stdin.buffer.read(side * side * 3), np.uint8)
            observation = {
                "observation.image": image.reshape(side, side, 3),
                "observation.state": np.frombuffer(sys.stdin.buffer.read(8), np.float32),
                "prompt": "push the T",
                **further,
            }
            further = {}
            try:
                actions = client.infer(observation)["actions"]
            except RuntimeError as error:  # what openpi's client makes of a text
                said = str(error).encode()
                sys.stdout.buffer.write(np.float32([-len(said), 0]).tobytes() + said)
            else:
                assert actions.shape == (1, 2)
                sys.stdout.buffer.write(np.ascontiguousarray(actions).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

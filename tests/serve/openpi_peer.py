"""A robot with the unmodified openpi-client; runs in an environment of its own, with NumPy 1.

python openpi_peer.py openpi|roboarena URL SIDE

Reads observations from stdin, uint8 (SIDE, SIDE, 3) and float32 (2,), or a line "reset"; writes
actions to stdout. RoboArena's client is openpi's with an endpoint and an id in every request.
"""

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


def main(kind: str, url: str, side: int) -> None:
    client = {"openpi": WebsocketClientPolicy, "roboarena": RoboArena}[kind](url)
    assert np.__version__.startswith("1.")
    assert client.get_server_metadata()["query"] == "every_step"
    while what := sys.stdin.buffer.read(1):
        if what == b"r":
            client.reset()
            sys.stdout.buffer.write(b"r")
        else:
            image = np.frombuffer(sys.stdin.buffer.read(side * side * 3), np.uint8)
            observation = {
                "observation.image": image.reshape(side, side, 3),
                "observation.state": np.frombuffer(sys.stdin.buffer.read(8), np.float32),
                "prompt": "push the T",
            }
            actions = client.infer(observation)["actions"]
            assert actions.shape == (1, 2)
            sys.stdout.buffer.write(np.ascontiguousarray(actions).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

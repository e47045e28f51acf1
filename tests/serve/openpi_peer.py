"""A robot with the unmodified openpi-client; runs in an environment of its own, with NumPy 1.

python openpi_peer.py openpi|msgpack_numpy|roboarena URL FOLDER

Acts on `FOLDER/images.npy`, uint8 (N, H, W, 3), and `states.npy`, float32 (N, 2), twice: the second
time on a new connection, or after RoboArena's reset. Writes `actions.npy`, float32 (2 * N, 2), and
what is said of frames of 1080p instead of the observation's own. RoboArena's client is openpi's with
an endpoint and an id in every request; `msgpack_numpy` packs as the package of that name does.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

# As long as a person resets the scene: longer than `--idle-s`, and than pings may take.
PAUSE_S = 2.0


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


KINDS = {"openpi": WebsocketClientPolicy, "roboarena": RoboArena, "msgpack_numpy": MsgpackNumpy}


def main(kind: str, url: str, folder: Path) -> None:
    assert np.__version__.startswith("1.")
    images, states = np.load(folder / "images.npy"), np.load(folder / "states.npy")
    large = np.zeros((1080, 1920, 3), np.uint8)
    client, actions, said = KINDS[kind](url), [], ""
    assert client.get_server_metadata()["query"] == "every_step"
    for episode in range(2):
        if episode and kind == "roboarena":
            client.reset()
        elif episode:
            client = KINDS[kind](url)
        for step, (image, state) in enumerate(zip(images, states, strict=True)):
            seen = {"observation.image": image, "observation.state": state, "prompt": "push"}
            # A camera that nobody looks at costs nothing.
            found = client.infer({**seen, "observation.images.wrist": large})["actions"]
            assert found.shape == (1, 2)
            actions.append(found[0])
            if step == 1:
                time.sleep(PAUSE_S)
                try:
                    client.infer({**seen, "observation.image": large})
                except RuntimeError as error:  # what openpi's client makes of a text
                    said = str(error)
    np.save(folder / "actions.npy", np.stack(actions))
    (folder / "said").write_text(said)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

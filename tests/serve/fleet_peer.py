"""Drives a fleet on Ray Serve, in Ray's environment: what its robots were told, as JSON.

python fleet_peer.py FIRST SECOND MISFIT KEY_FILE PORT RESULT
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

ROBOTS, STEPS, SIZE = 8, 40, 24
SECONDS = 90.0
# The steps before which a replica is killed, and before which another is and a bundle rolled out.
KILL_AT, ROLL_OUT_AT = 12, 25
# A robot's steps before all replicas are killed, and for how long it waits for an answer.
LOST_AT, HELD_S = 6, 5.0


def observations(seed: int, count: int) -> list[dict[str, np.ndarray]]:
    """What the miniature policy may see."""
    random = np.random.default_rng(seed)
    return [
        {
            "observation.image": random.integers(0, 256, (SIZE, SIZE, 3), np.uint8),
            "observation.state": random.uniform([-2, 10], [2, 50]).astype(np.float32),
        }
        for _ in range(count)
    ]


def act(number: int, url: str, headers: dict[str, str], steps: Any) -> list[list[float]]:
    """A robot's episode, a reset, and another episode; all robots step by step together."""
    from vqbet_serve.frames import array, pack, unpack
    from websockets.sync.client import connect

    actions, name = [], {"session_id": f"robot {number}"}
    with connect(url, additional_headers=headers, compression=None, proxy=None) as client:
        client.recv(SECONDS)
        for episode in range(2):
            for seen in observations(number + 100 * episode, STEPS):
                steps.wait(SECONDS)
                client.send(pack({**seen, **name}))
                answer = client.recv(SECONDS)
                assert isinstance(answer, bytes), answer
                actions.append(array("a", unpack(answer)["actions"])[0].tolist())
            steps.wait(SECONDS)
            client.send(pack({"endpoint": "reset", **name}))
            assert client.recv(SECONDS) == "reset successful"
    return actions


def processes(title: str) -> list[int]:
    """Of this cluster, by what they are called."""
    marker, found = os.environ["VQBET_FLEET"].encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = title.encode() in (folder / "cmdline").read_bytes()
            ours = marker in (folder / "environ").read_bytes()
        except OSError:
            continue
        if ours and named:
            found.append(int(folder.name))
    return found


def replicas(name: str) -> list[int]:
    """Processes that are replicas of an application."""
    return processes(f"ServeReplica:{name}:Policy")


def applications() -> dict[str, str]:
    """Their statuses."""
    from ray import serve

    return {name: app.status.value for name, app in serve.status().applications.items()}


def until(what: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def refusals(url: str, headers: dict[str, str]) -> dict[str, str]:
    """What hostile clients come up against."""
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect

    def status(**options: Any) -> str:
        try:
            with connect(url, proxy=None, **options):
                return "open"
        except InvalidStatus as error:
            return str(error.response.status_code)

    def closed(frame: bytes | str) -> str:
        with connect(url, proxy=None, compression=None, additional_headers=headers) as client:
            client.recv(SECONDS)
            said = ""
            try:
                client.send(frame)
                for _ in range(2):
                    said += str(client.recv(SECONDS))
            except ConnectionClosed:
                pass
            return f"{client.close_code} {said}"

    return {
        "no key": status(),
        "wrong key": status(additional_headers={"Authorization": "Api-Key wrong"}),
        "web page": status(additional_headers=headers, origin="http://example.com"),
        "large": closed(bytes(20 << 20)),
        "text": closed("text"),
        "garbage": closed(b"\xc1" * 100),
    }


def causes() -> dict[str, str]:
    """What becomes of errors in a replica."""
    import ray_app
    from ray.exceptions import RayTaskError

    from vqbet_edge import BackendError

    raised = BackendError("ours"), ValueError("theirs")
    texts = "answer", "a remote traceback"
    found = [RayTaskError(*texts, cause, "f", 7, "10.0.0.9") for cause in raised]
    return {type(error.cause).__name__: repr(ray_app.own_error(error)) for error in found}


def lose_all(name: str, url: str, key: str) -> dict[str, Any]:
    """All replicas are killed at once, and none starts anew before its robots were told."""
    from vqbet_serve import RemotePolicy
    from vqbet_serve.frames import pack
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    from vqbet_edge import Guards, HistoryError

    guards, seen = Guards(deadline_s=HELD_S, on_late="hold"), observations(500, STEPS)
    options: dict[str, Any] = {"api_key": key, "session_id": "lost", "connect_s": SECONDS}
    headers = {"Authorization": f"Api-Key {key}"}
    with RemotePolicy(url, guards=guards, **options) as policy:
        before = [policy.act(each).tolist() for each in seen[:LOST_AT]]
        [controller] = processes("ServeController")
        during, told = list[list[float]](), ""
        os.kill(controller, signal.SIGSTOP)
        try:
            for replica in replicas(name):
                os.kill(replica, signal.SIGKILL)
            for each in seen[LOST_AT:]:
                try:
                    during.append(policy.act(each).tolist())
                except HistoryError as error:  # noqa: PERF203
                    told = str(error)
                    break
            with connect(url, additional_headers=headers, compression=None, proxy=None) as client:
                client.recv(SECONDS)
                client.send(pack(seen[0]))
                said = str(client.recv(SECONDS))
                try:
                    client.recv(SECONDS)
                except ConnectionClosed:
                    said += f" {client.close_code}"
        finally:
            os.kill(controller, signal.SIGCONT)
        until(lambda: len(replicas(name)) == 2 and applications()[name] == "RUNNING")
        policy.reset(from_action=(before + during)[-1])
        after = [policy.act(each).tolist() for each in seen]
    return {"before": before, "during": during, "told": told, "said": said, "after": after}


def drive(first: Path, second: Path, misfit: Path, key: Path, port: int) -> dict[str, Any]:
    import ray_app

    from vqbet_edge import UsageError

    def arguments(bundle: Path) -> ray_app.Arguments:
        small = {"replica_cpus": 0.5, "ingress_cpus": 0.5, "idle_s": SECONDS}
        return ray_app.Arguments(bundle=str(bundle), port=port, api_key_file=key, **small)

    names = [ray_app.roll_out(arguments(first))]
    with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=SECONDS) as ready:
        assert ready.read() == b"OK\n"
    url, headers = f"ws://127.0.0.1:{port}", {"Authorization": f"Api-Key {key.read_text()}"}
    refused = refusals(url, headers)
    refused |= causes()
    try:
        ray_app.roll_out(arguments(misfit))
    except UsageError as error:
        refused["misfit"] = str(error)
    killed: list[int] = []

    def between() -> None:
        """Runs when all robots have had their action, before the next step."""
        nonlocal step
        if step == KILL_AT:
            threading.Timer(0.05, kill).start()  # while they act
        if step == ROLL_OUT_AT:
            lose_one()
            names.append(ray_app.roll_out(arguments(second)))
            time.sleep(3 * ray_app._LOOK_S)  # connections have looked
        step += 1

    def kill() -> None:
        killed.append(replicas("policy-1")[0])
        os.kill(killed[-1], signal.SIGKILL)

    def lose_one() -> None:
        """Until Ray says that the policy, of which one replica acts, is not in order."""
        until(lambda: len(replicas("policy-1")) == 2)
        until(lambda: applications()["policy-1"] == "RUNNING")
        kill()
        until(lambda: applications()["policy-1"] != "RUNNING")

    step, steps = 0, threading.Barrier(ROBOTS, between)
    with ThreadPoolExecutor(ROBOTS) as pool:
        acting = [pool.submit(act, number, url, headers, steps) for number in range(ROBOTS)]
        actions = [each.result() for each in acting]
    running = applications()
    lost = lose_all(names[-1], url, key.read_text())
    return {
        "lost": lost,
        "names": names,
        "applications": running,
        "killed": len(killed),
        "refused": refused,
        "actions": actions,
    }


def main() -> None:
    # Ray takes this machine's own address otherwise, also where it is alone.
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    *bundles, key, port, told = sys.argv[1:]
    import ray

    # Sockets have short names.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        options = {"include_dashboard": False, "log_to_driver": False, "_temp_dir": folder}
        ray.init(num_cpus=4, object_store_memory=80 << 20, **options)
        try:
            result = drive(*map(Path, bundles), Path(key), int(port))
        finally:
            ray.shutdown()
    Path(told).write_text(json.dumps(result))  # Ray writes to stdout


if __name__ == "__main__":
    main()

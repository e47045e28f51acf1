"""A robot's runtime talks to nobody and starts nothing."""

import json
import subprocess
import sys
from pathlib import Path

WATCHED = """
import json, sys
events = []
def audit(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "ctypes.dlopen",
                         "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.", "webbrowser.")):
        events.append((event, repr(arguments)[:200]))
sys.addaudithook(audit)
import vqbet_edge
imported = list(events)
policy = vqbet_edge.EdgePolicy.load(sys.argv[1], backend="onnxruntime")
import numpy as np
for _ in range(12):
    policy.act({"observation.image": np.zeros((24, 24, 3), np.uint8),
                "observation.state": np.zeros(2, np.float32)})
acted = events[len(imported):]
import socket
socket.socket().close()
print(json.dumps({"import": imported, "act": acted, "control": events[len(imported) + len(acted):]}))
"""


def watched(bundle: Path) -> dict[str, list[list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, bundle], capture_output=True, text=True, check=True
    )
    found: dict[str, list[list[str]]] = json.loads(done.stdout)
    return found


def test_no_connection_no_process_no_pickle(mini: Path) -> None:
    found = watched(mini)
    assert "socket.__new__" in [event for event, _ in found.pop("control")]
    # NumPy and ONNX Runtime open their own libraries.
    for events in found.values():
        assert [event for event in events if event[0] != "ctypes.dlopen"] == []

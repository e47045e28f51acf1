"""Electric power, as boards report it through the kernel's hardware monitors."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

HWMON = Path("/sys/class/hwmon")
# Power monitors of Jetsons: INA3221 on Orin, INA238 besides on Thor.
_CHIPS = frozenset({"ina3221", "ina238"})
# What the whole board draws, where it is measured.
_TOTAL_RAILS = ("VDD_IN", "VIN")
_INTERVAL = 0.1


def read_rails(root: Path = HWMON) -> dict[str, float]:
    """Watts of every rail; empty where nothing is reported."""
    rails: dict[str, float] = {}
    for chip in sorted(root.glob("hwmon*")):
        if read_text(chip / "name") not in _CHIPS:
            continue
        for label in sorted(chip.glob("in*_label")):
            channel, name = label.name[2 : -len("_label")], read_text(label)
            millivolts = _number(chip / f"in{channel}_input")
            milliamperes = _number(chip / f"curr{channel}_input")
            if name and millivolts is not None and milliamperes is not None:
                rails[name] = millivolts * milliamperes / 1e6
        microwatts = _number(chip / "power1_input")
        if microwatts is not None:
            rails[read_text(chip / "label") or "VIN"] = microwatts / 1e6
    return rails


def total_rail(rails: Mapping[str, float]) -> str | None:
    """The rail that carries the whole board; None when there is none."""
    return next((name for name in _TOTAL_RAILS if name in rails), None)


class PowerMeter:
    """Samples the rails ten times a second until it is closed."""

    def __init__(self, root: Path = HWMON) -> None:
        self._root = root
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if read_rails(root):
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._samples.append((time.monotonic(), read_rails(self._root)))
            self._stop.wait(_INTERVAL)

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def mean(self, began: float, ended: float) -> dict[str, float]:
        """Mean watts of every rail between two moments of the monotonic clock."""
        found = [rails for moment, rails in list(self._samples) if began <= moment <= ended]
        names = found[0] if found else {}
        return {name: sum(r.get(name, 0.0) for r in found) / len(found) for name in names}


def read_text(path: Path) -> str:
    """A small file of the kernel's; empty where there is none."""
    try:
        return path.read_text().strip("\0\n ")
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(read_text(path))
    except ValueError:
        return None

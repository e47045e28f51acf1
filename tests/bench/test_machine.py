"""What the kernel tells about power, clocks and memory, read from trees made here."""

import time
from pathlib import Path
from typing import Any

import pytest
from vqbet_bench.machine import clocks, cpu_field, unlocked, vector_units
from vqbet_bench.memory import peak_resident
from vqbet_bench.power import PowerMeter, read_rails, total_rail


def write(root: Path, files: dict[str, Any]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """An INA3221 as JetPack 6 shows it on an Orin Nano, beside a fan."""
    rails = {
        "1_label": "VDD_IN", "1_input": 5000, "2_label": "VDD_CPU_GPU_CV", "2_input": 5000,
        "7_label": "sum of shunt voltages", "7_input": 80,
    }  # fmt: skip
    fan = {"hwmon0/name": "pwmfan", "hwmon0/in1_label": "no rail"}
    chip = {f"hwmon1/in{name}": text for name, text in rails.items()}
    currents = {"hwmon1/curr1_input": 1500, "hwmon1/curr2_input": 400}
    return write(tmp_path, {**fan, "hwmon1/name": "ina3221", **chip, **currents})


def test_rails_are_volts_times_amperes(orin: Path) -> None:
    rails = read_rails(orin)
    assert rails == pytest.approx({"VDD_IN": 7.5, "VDD_CPU_GPU_CV": 2.0})
    assert total_rail(rails) == "VDD_IN"
    assert total_rail({"VDD_GPU_SOC": 1.0, "VDD_CPU_CV": 2.0}) is None


def test_a_monitor_of_power_itself(tmp_path: Path) -> None:
    write(tmp_path, {"hwmon3/name": "ina238", "hwmon3/power1_input": 12_500_000})
    assert read_rails(tmp_path) == {"VIN": 12.5}


def test_the_meter_averages_what_it_saw_between_two_moments(orin: Path, tmp_path: Path) -> None:
    nothing = PowerMeter(tmp_path / "no board")
    assert nothing.mean(0, time.monotonic()) == {}
    nothing.close()
    meter = PowerMeter(orin)
    for milliamperes, watts in ((1500, 7.5), (3000, 15.0)):
        (orin / "hwmon1/curr1_input").write_text(f"{milliamperes}\n")
        while not any(rails["VDD_IN"] == watts for _, rails in meter._samples):
            time.sleep(0.01)
    meter.close()
    moments = [moment for moment, _ in meter._samples]
    assert 7.5 < meter.mean(moments[0], moments[-1])["VDD_IN"] < 15.0
    assert meter.mean(moments[0], moments[0])["VDD_IN"] == 7.5
    assert meter.mean(moments[0] - 2, moments[0] - 1) == {}


def test_vector_units_of_x86_and_arm(tmp_path: Path) -> None:
    x86 = "model name\t: EPYC\nflags\t\t: sse fma avx2 avx512_vnni\n\nflags\t\t: none"
    arm = "processor\t: 0\nFeatures\t: fp asimd atomics asimddp"
    write(tmp_path, {"x86": x86, "arm": arm})
    assert vector_units(tmp_path / "x86") == ["avx2", "avx512_vnni"]
    assert cpu_field(tmp_path / "x86", "model name") == "EPYC"
    assert vector_units(tmp_path / "arm") == ["asimd", "asimddp"]
    assert vector_units(tmp_path / "missing") == []


def test_clocks_that_may_move_are_named(tmp_path: Path) -> None:
    lowest = [("performance", 100_000), ("schedutil", 1_500_000), ("schedutil", 100_000)]
    for core, (governor, low) in enumerate(lowest):
        found = {"governor": governor, "min_freq": low, "max_freq": 1_500_000}
        write(tmp_path, {f"cpu{core}/cpufreq/scaling_{k}": v for k, v in found.items()})
    gpu = {"governor": "nvhost_podgov", "min_freq": 306_000_000, "max_freq": 624_750_000}
    write(tmp_path / "gpus", {f"17000000.gpu/{k}": v for k, v in gpu.items()})
    write(tmp_path / "gpus", {"15340000.vic/governor": "tegra_wmark"})
    found = clocks(tmp_path, tmp_path / "gpus")
    assert found["cpu1"] == "schedutil, 1500 to 1500 MHz"
    assert found["17000000.gpu"] == "nvhost_podgov, 306 to 625 MHz"
    assert unlocked(found) == ["cpu2", "17000000.gpu"]


def test_peak_memory_is_the_kernels_high_water_mark() -> None:
    assert peak_resident("Name:\tpython\nVmHWM:\t  123456 kB\nVmRSS:\t 1 kB\n") == 123456 * 1024

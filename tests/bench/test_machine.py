"""What the kernel tells about power, clocks and memory, read from trees made here."""

import time
from pathlib import Path
from typing import Any

import pytest
from vqbet_bench.machine import cpu_clocks, cpu_field, gpu_clocks, unlocked, vector_units
from vqbet_bench.memory import peak_resident
from vqbet_bench.power import PowerMeter, read_rails, total_rail


def write(root: Path, files: Any) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.fixture
def orin(tmp_path: Path) -> Any:
    """An INA3221 as JetPack 6 shows it on an Orin Nano, beside a fan."""
    write(
        tmp_path,
        {
            "hwmon0/name": "pwmfan",
            "hwmon0/in1_label": "no rail",
            "hwmon1/name": "ina3221",
            "hwmon1/in1_label": "VDD_IN",
            "hwmon1/in1_input": 5000,
            "hwmon1/curr1_input": 1500,
            "hwmon1/in2_label": "VDD_CPU_GPU_CV",
            "hwmon1/in2_input": 5000,
            "hwmon1/curr2_input": 400,
            "hwmon1/in7_label": "sum of shunt voltages",
            "hwmon1/in7_input": 80,
        },
    )
    return tmp_path


def test_rails_are_volts_times_amperes(orin: Path) -> None:
    assert read_rails(orin) == pytest.approx({"VDD_IN": 7.5, "VDD_CPU_GPU_CV": 2.0})


def test_the_total_is_the_rail_that_carries_the_board(orin: Path) -> None:
    assert total_rail(read_rails(orin)) == "VDD_IN"
    assert total_rail({"VDD_GPU_SOC": 1.0, "VDD_CPU_CV": 2.0}) is None


def test_a_monitor_of_power_itself(tmp_path: Path) -> None:
    write(tmp_path, {"hwmon3/name": "ina238", "hwmon3/power1_input": 12_500_000})
    assert read_rails(tmp_path) == {"VIN": 12.5}


def test_vector_units_of_x86_and_arm(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "x86": "model name\t: EPYC\nflags\t\t: sse fma avx2 avx512_vnni\n\nflags\t\t: none",
            "arm": "processor\t: 0\nFeatures\t: fp asimd atomics asimddp",
        },
    )
    assert vector_units(tmp_path / "x86") == ["avx2", "avx512_vnni"]
    assert cpu_field(tmp_path / "x86", "model name") == "EPYC"
    assert vector_units(tmp_path / "arm") == ["asimd", "asimddp"]
    assert vector_units(tmp_path / "missing") == []


def test_no_board_reports_nothing(tmp_path: Path) -> None:
    meter = PowerMeter(tmp_path)
    assert meter.mean(0, time.monotonic()) == {}
    meter.close()


def test_the_meter_averages_what_it_saw_between_two_moments(orin: Path) -> None:
    began = time.monotonic()
    meter = PowerMeter(orin)
    time.sleep(0.25)
    (orin / "hwmon1/curr1_input").write_text("3000\n")
    time.sleep(0.25)
    meter.close()
    assert 7.5 < meter.mean(began, time.monotonic())["VDD_IN"] < 15.0
    assert meter.mean(began - 2, began - 1) == {}


def test_clocks_that_may_move_are_named(tmp_path: Path) -> None:
    for core, (governor, low) in enumerate(
        [("performance", 100_000), ("schedutil", 1_500_000), ("schedutil", 100_000)]
    ):
        folder = f"cpu{core}/cpufreq/scaling_"
        write(
            tmp_path,
            {
                f"{folder}governor": governor,
                f"{folder}min_freq": low,
                f"{folder}max_freq": 1_500_000,
            },
        )
    clocks = cpu_clocks(tmp_path)
    assert clocks["cpu1"] == "schedutil, 1500 to 1500 MHz"
    assert unlocked(clocks) == ["cpu2"]


def test_a_jetsons_gpu_clock(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "17000000.gpu/governor": "nvhost_podgov",
            "17000000.gpu/min_freq": 306_000_000,
            "17000000.gpu/max_freq": 624_750_000,
            "15340000.vic/governor": "tegra_wmark",
        },
    )
    clocks = gpu_clocks(tmp_path)
    assert clocks == {"17000000.gpu": "nvhost_podgov, 306 to 625 MHz"}
    assert unlocked(clocks) == ["17000000.gpu"]


def test_peak_memory_is_the_kernels_high_water_mark() -> None:
    assert peak_resident("Name:\tpython\nVmHWM:\t  123456 kB\nVmRSS:\t 1 kB\n") == 123456 * 1024

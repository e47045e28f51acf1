"""Every way in which a stored engine can be wrong is found before TensorRT sees a byte of it."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends.engine_cache import (
    BuildOptions,
    EngineCache,
    EngineKey,
)
from vqbet_edge.runtime.backends.private_files import CACHE_VARIABLE, user_cache

KEY = EngineKey(
    stage="gpt",
    graph_sha256="ab" * 32,
    flavour="tensorrt",
    tensorrt="10.3.0",
    gpu="Orin",
    compute_capability="8.7",
    driver="12.6 (540.4.0)",
    options=BuildOptions(512, 3),
)
PLAN = bytes(range(256)) * 64


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(path))
    return path


@pytest.fixture
def plan() -> Path:
    """A stored engine."""
    return EngineCache().store(KEY, PLAN, 1.5)


def reason(key: EngineKey = KEY) -> str:
    found = EngineCache().find(key)
    assert found.plan is None
    assert found.path is None
    return found.reason


def test_what_was_stored_is_found(plan: Path) -> None:
    found = EngineCache().find(KEY)
    assert (found.plan, found.path, found.reason) == (PLAN, plan, "")
    assert plan.is_relative_to(user_cache() / "engines")


@pytest.mark.usefixtures("plan")
def test_the_robot_takes_any_build_options() -> None:
    assert EngineCache().find(msgspec.structs.replace(KEY, options=None)).plan == PLAN
    other = msgspec.structs.replace(KEY, options=BuildOptions(1024, 3))
    assert "options" in reason(other)


def test_nothing_was_built() -> None:
    assert "no engine has been built for this device" in reason()
    assert str(user_cache()) in reason()


@pytest.mark.parametrize(
    ("field", "value"),
    [("tensorrt", "10.13.3"), ("gpu", "Thor"), ("compute_capability", "11.0"),
     ("flavour", "tensorrt_rtx"), ("graph_sha256", "cd" * 32), ("stage", "code_heads")],
)  # fmt: skip
@pytest.mark.usefixtures("plan")
def test_another_device_or_graph_has_another_place(field: str, value: str) -> None:
    assert "no engine" in reason(msgspec.structs.replace(KEY, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tensorrt", "10.13.3"), ("gpu", "Thor"), ("compute_capability", "11.0"),
     ("flavour", "tensorrt_rtx"), ("graph_sha256", "cd" * 32), ("stage", "code_heads"),
     ("driver", "13.0")],
)  # fmt: skip
def test_an_engine_moved_to_another_ones_place(
    plan: Path, home: Path, field: str, value: str
) -> None:
    wanted = msgspec.structs.replace(KEY, **{field: value})
    folder = home / "engines" / wanted.device
    folder.mkdir(mode=0o700, exist_ok=True)
    for suffix in (".plan", ".json"):
        plan.with_suffix(suffix).rename(folder / (wanted.file_stem + suffix))
    assert f"built for {field}" in reason(wanted)


def test_swapped_plans(plan: Path) -> None:
    other = msgspec.structs.replace(KEY, stage="code_heads")
    theirs = EngineCache().store(other, PLAN[::-1], 1.0)
    plan.write_bytes(theirs.read_bytes())
    assert "altered" in reason()


def test_a_truncated_plan(plan: Path) -> None:
    plan.write_bytes(PLAN[:-1])
    assert "truncated" in reason()


def test_a_longer_plan(plan: Path) -> None:
    plan.write_bytes(PLAN + b"\0")
    assert "larger than expected" in reason()


@pytest.mark.parametrize("position", [0, len(PLAN) // 2, len(PLAN) - 1])
def test_a_flipped_byte(plan: Path, position: int) -> None:
    data = bytearray(PLAN)
    data[position] ^= 1
    plan.write_bytes(data)
    assert "altered" in reason()


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[" * 100_000, '{"key": 1}', "\xff", '{"seal": "\xff"}']
)
def test_a_damaged_record(plan: Path, text: str) -> None:
    plan.with_suffix(".json").write_bytes(text.encode("latin-1"))
    assert reason()


@pytest.mark.parametrize("suffix", [".plan", ".json"])
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write(plan: Path, suffix: str, mode: int) -> None:
    plan.with_suffix(suffix).chmod(mode)
    assert "somebody else" in reason()


def test_a_folder_that_others_may_write(plan: Path) -> None:
    plan.parent.chmod(0o777)
    assert "somebody else" in reason()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_above_that_others_may_write(plan: Path, tmp_path: Path, mode: int) -> None:
    """Whoever may write there can put another folder in this one's place."""
    tmp_path.chmod(mode)
    assert f"'{tmp_path}' can be written by somebody else" in reason()
    # Unless nobody may rename what is not theirs, as in /tmp.
    tmp_path.chmod(mode | 0o1000)
    assert EngineCache().find(KEY).path == plan


def test_a_cache_behind_a_link(
    plan: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another disk, say; what counts is where it leads."""
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "link"))
    assert EngineCache().find(KEY).plan == PLAN
    plan.parent.chmod(0o777)
    assert "somebody else" in reason()


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_links_are_not_followed(plan: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "elsewhere"
    plan.with_suffix(suffix).rename(target)
    plan.with_suffix(suffix).symlink_to(target)
    assert "cannot be read" in reason()


def test_a_pipe_does_not_block(plan: Path) -> None:
    plan.unlink()
    os.mkfifo(plan, 0o600)
    assert "not a regular file" in reason()


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_directory_in_its_place(plan: Path, suffix: str) -> None:
    plan.with_suffix(suffix).unlink()
    plan.with_suffix(suffix).mkdir(mode=0o700)
    assert "not a regular file" in reason()


def test_a_missing_plan(plan: Path) -> None:
    plan.unlink()
    assert "cannot be read" in reason()


def test_nowhere_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(DiskError, match=CACHE_VARIABLE) as caught:
        EngineCache().store(KEY, PLAN, 1.0)
    assert caught.value.exit_code == 5


# Dies at the n-th rename: 1 is the plan's, 2 the record's.
KILLED = """
import os, signal, sys
from pathlib import Path
import tests_key
from vqbet_edge.runtime.backends.engine_cache import EngineCache
replace, left = Path.replace, [int(sys.argv[1])]
def dying(self, target):
    left[0] -= 1
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
EngineCache().store(tests_key.KEY, bytes(1000), 1.0)
"""


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_killed_while_writing(tmp_path: Path, rename: int, before: bool) -> None:
    """An engine that was there is replaced whole, or found out; never half of each is loaded."""
    if before:
        EngineCache().store(KEY, PLAN, 1.0)
    (tmp_path / "tests_key.py").write_text(
        "import msgspec\nfrom vqbet_edge.runtime.backends.engine_cache import EngineKey\n"
        f"KEY = msgspec.json.decode({msgspec.json.encode(KEY)!r}, type=EngineKey)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(rename)], env=environment)
    assert done.returncode == -9
    found = EngineCache().find(KEY)
    if before and rename == 1:
        assert found.plan == PLAN
    elif before:
        assert "altered" in found.reason or "larger" in found.reason
    else:
        assert "no engine" in found.reason
    assert EngineCache().store(KEY, PLAN, 1.0)
    assert EngineCache().find(KEY).plan == PLAN


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/vqbet_edge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache/vqbet_edge"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_cache_that_others_may_write(home: Path, mode: int) -> None:
    """Such as /tmp, where another user could have put engines first."""
    home.mkdir()
    home.chmod(mode)
    with pytest.raises(DiskError, match=f"chmod.*{CACHE_VARIABLE}"):
        EngineCache().store(KEY, PLAN, 1.0)
    assert list(home.iterdir()) == []


def test_an_empty_variable_is_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/vqbet_edge")


def test_what_a_killed_process_left_is_swept(plan: Path) -> None:
    """But not what another process may be writing just now, nor files of other names."""
    old, new = (plan.with_name(f".{plan.name}.{digit * 16}") for digit in "ab")
    other = plan.with_name(".something.plan")
    for path in (old, new, other):
        path.write_bytes(PLAN)
    for path in (old, other):
        os.utime(path, (0, 0))
    EngineCache().store(KEY, PLAN, 1.0)
    assert not old.exists()
    assert new.exists()
    assert other.exists()

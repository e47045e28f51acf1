"""Every way in which a stored engine can be wrong is found before TensorRT sees a byte of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends import engine_cache, private_files
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
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "test.bundle"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def plan(bundle: Path) -> Path:
    """A stored engine."""
    return EngineCache(bundle).store(KEY, PLAN, 1.5)


def reason(bundle: Path, key: EngineKey = KEY) -> str:
    found = EngineCache(bundle).find(key)
    assert found.plan is None
    assert found.path is None
    return found.reason


def rewrite(plan: Path, **changes: object) -> None:
    """Change fields of a record, as somebody who knows the format would."""
    record = json.loads(plan.with_suffix(".json").read_text())
    plan.with_suffix(".json").write_text(json.dumps(record | changes))


def test_what_was_stored_is_found(bundle: Path, plan: Path) -> None:
    found = EngineCache(bundle).find(KEY)
    assert (found.plan, found.path, found.reason) == (PLAN, plan, "")
    assert plan.is_relative_to(bundle / "engines")


@pytest.mark.usefixtures("plan")
def test_the_robot_takes_any_build_options(bundle: Path) -> None:
    assert EngineCache(bundle).find(msgspec.structs.replace(KEY, options=None)).plan == PLAN
    other = msgspec.structs.replace(KEY, options=BuildOptions(1024, 3))
    assert "options" in reason(bundle, other)


def test_nothing_was_built(bundle: Path) -> None:
    assert reason(bundle) == "no engine has been built for this device yet"


@pytest.mark.parametrize(
    ("field", "value"),
    [("tensorrt", "10.13.3"), ("gpu", "Thor"), ("compute_capability", "11.0"),
     ("flavour", "tensorrt_rtx"), ("graph_sha256", "cd" * 32), ("stage", "code_heads")],
)  # fmt: skip
@pytest.mark.usefixtures("plan")
def test_another_device_or_graph_has_another_place(bundle: Path, field: str, value: str) -> None:
    assert "no engine" in reason(bundle, msgspec.structs.replace(KEY, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tensorrt", "10.13.3"), ("gpu", "Thor"), ("compute_capability", "11.0"),
     ("flavour", "tensorrt_rtx"), ("graph_sha256", "cd" * 32), ("stage", "code_heads"),
     ("driver", "13.0")],
)  # fmt: skip
def test_an_engine_moved_to_another_ones_place(
    bundle: Path, plan: Path, field: str, value: str
) -> None:
    wanted = msgspec.structs.replace(KEY, **{field: value})
    folder = bundle / "engines" / wanted.device
    folder.mkdir(mode=0o700, exist_ok=True)
    for suffix in (".plan", ".json"):
        plan.with_suffix(suffix).rename(folder / (wanted.file_stem + suffix))
    assert f"built for {field}" in reason(bundle, wanted)


def test_swapped_plans(bundle: Path, plan: Path) -> None:
    other = msgspec.structs.replace(KEY, stage="code_heads")
    theirs = EngineCache(bundle).store(other, PLAN[::-1], 1.0)
    plan.write_bytes(theirs.read_bytes())
    assert "altered" in reason(bundle)


def test_a_truncated_plan(bundle: Path, plan: Path) -> None:
    plan.write_bytes(PLAN[:-1])
    assert "truncated" in reason(bundle)


def test_a_longer_plan(bundle: Path, plan: Path) -> None:
    plan.write_bytes(PLAN + b"\0")
    assert "larger than expected" in reason(bundle)


@pytest.mark.parametrize("position", [0, len(PLAN) // 2, len(PLAN) - 1])
def test_a_flipped_byte(bundle: Path, plan: Path, position: int) -> None:
    data = bytearray(PLAN)
    data[position] ^= 1
    plan.write_bytes(data)
    assert "altered" in reason(bundle)


def test_a_plan_and_a_record_of_somebody_else(bundle: Path, plan: Path) -> None:
    """A downloaded bundle can bring engines with correct digests; they are code all the same."""
    import hashlib

    data = b"evil" * 100
    plan.write_bytes(data)
    rewrite(plan, plan_sha256=hashlib.sha256(data).hexdigest(), size=len(data))
    assert reason(bundle) == "the engine was not built by this user on this machine"


@pytest.mark.usefixtures("plan")
def test_an_engine_of_another_machine(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "another machine"))
    assert "not built by this user on this machine" in reason(bundle)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[" * 100_000, '{"key": 1}', "\xff", '{"seal": "\xff"}']
)
def test_a_damaged_record(bundle: Path, plan: Path, text: str) -> None:
    plan.with_suffix(".json").write_bytes(text.encode("latin-1"))
    assert reason(bundle)


@pytest.mark.parametrize("suffix", [".plan", ".json"])
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write(bundle: Path, plan: Path, suffix: str, mode: int) -> None:
    plan.with_suffix(suffix).chmod(mode)
    assert "somebody else" in reason(bundle)


def test_a_folder_that_others_may_write(bundle: Path, plan: Path) -> None:
    plan.parent.chmod(0o777)
    assert "somebody else" in reason(bundle)


def test_a_foreign_owner(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user sees it: that user owns neither folder nor files."""
    monkeypatch.setattr(private_files.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(private_files.RejectedError, match="somebody else"):
        private_files.read_private(plan, len(PLAN))
    with pytest.raises(private_files.RejectedError, match="somebody else"):
        engine_cache._load(plan.parent, KEY, b"")


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_links_are_not_followed(bundle: Path, plan: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / "elsewhere"
    plan.with_suffix(suffix).rename(target)
    plan.with_suffix(suffix).symlink_to(target)
    assert "cannot be read" in reason(bundle)


def test_a_pipe_does_not_block(bundle: Path, plan: Path) -> None:
    plan.unlink()
    os.mkfifo(plan, 0o600)
    assert "not a regular file" in reason(bundle)


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_a_directory_in_its_place(bundle: Path, plan: Path, suffix: str) -> None:
    plan.with_suffix(suffix).unlink()
    plan.with_suffix(suffix).mkdir(mode=0o700)
    assert "not a regular file" in reason(bundle)


def test_a_missing_plan(bundle: Path, plan: Path) -> None:
    plan.unlink()
    assert "cannot be read" in reason(bundle)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_bundle_that_others_may_write_gets_no_engines(
    bundle: Path, home: Path, mode: int
) -> None:
    bundle.chmod(mode)
    stored = EngineCache(bundle).store(KEY, PLAN, 1.0)
    assert stored.is_relative_to(home)
    assert EngineCache(bundle).find(KEY).plan == PLAN


def test_a_read_only_bundle(bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the answer of the operating system is given here."""
    monkeypatch.setattr(engine_cache.os, "access", lambda path, _mode: path != bundle)
    stored = EngineCache(bundle).store(KEY, PLAN, 1.0)
    assert stored.is_relative_to(home)
    assert EngineCache(bundle).find(KEY).plan == PLAN


def test_nowhere_to_write(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(DiskError, match=CACHE_VARIABLE) as caught:
        EngineCache(bundle).store(KEY, PLAN, 1.0)
    assert caught.value.exit_code == 5


def test_only_the_owner_may_read(plan: Path, home: Path) -> None:
    modes = {path: path.stat().st_mode & 0o777 for path in (plan, plan.with_suffix(".json"))}
    assert set(modes.values()) == {0o600}
    assert plan.parent.stat().st_mode & 0o777 == 0o700
    assert home.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in home.iterdir()} == {0o600}


# Dies at the n-th rename: 1 is the plan's, 2 the record's.
KILLED = """
import os, signal, sys
from pathlib import Path
import tests_key
from vqbet_edge.runtime.backends.engine_cache import EngineCache
replace, left = Path.replace, [int(sys.argv[2])]
def dying(self, target):
    left[0] -= 1
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
EngineCache(Path(sys.argv[1])).store(tests_key.KEY, bytes(1000), 1.0)
"""


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_killed_while_writing(bundle: Path, tmp_path: Path, rename: int, before: bool) -> None:
    """An engine that was there is replaced whole, or found out; never half of each is loaded."""
    if before:
        EngineCache(bundle).store(KEY, PLAN, 1.0)
    (tmp_path / "tests_key.py").write_text(
        "import msgspec\nfrom vqbet_edge.runtime.backends.engine_cache import EngineKey\n"
        f"KEY = msgspec.json.decode({msgspec.json.encode(KEY)!r}, type=EngineKey)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(bundle), str(rename)], env=environment)
    assert done.returncode == -9
    found = EngineCache(bundle).find(KEY)
    if before and rename == 1:
        assert found.plan == PLAN
    elif before:
        assert "altered" in found.reason or "larger" in found.reason
    else:
        assert "no engine" in found.reason
    assert EngineCache(bundle).store(KEY, PLAN, 1.0)
    assert EngineCache(bundle).find(KEY).plan == PLAN


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/vqbet_edge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache/vqbet_edge"


@pytest.fixture
def key(home: Path, plan: Path) -> Path:  # noqa: ARG001 - storing makes the key
    """The key that sealed the stored engine."""
    return home / "engine-seal.key"


@pytest.mark.parametrize("size", [0, 1, 31, 33])
def test_a_key_of_another_length(bundle: Path, key: Path, size: int) -> None:
    """Anybody can compute seals with an empty key, as is left where writing it was cut short."""
    key.write_bytes(bytes(size))
    with pytest.raises(DiskError, match=r"key.*(delete|larger)"):
        EngineCache(bundle).find(KEY)
    with pytest.raises(DiskError, match="delete"):
        EngineCache(bundle).store(KEY, PLAN, 1.0)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o610, 0o620])
def test_a_key_that_others_may_read(bundle: Path, key: Path, mode: int) -> None:
    key.chmod(mode)
    with pytest.raises(DiskError, match=r"somebody else.*delete"):
        EngineCache(bundle).find(KEY)


def test_dying_while_the_key_is_written(
    bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads meanwhile finds no key or a whole one."""

    def dying(_handle: int) -> None:
        assert not (home / "engine-seal.key").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(private_files.os, "fsync", dying)
        with pytest.raises(KeyboardInterrupt):
            EngineCache(bundle).store(KEY, PLAN, 1.0)
    assert list(home.iterdir()) == []
    assert EngineCache(bundle).store(KEY, PLAN, 1.0)


def test_a_key_of_a_faster_process_stays(home: Path) -> None:
    home.mkdir(mode=0o700)
    path = home / "engine-seal.key"
    private_files.create_secret(path, 32)
    first = path.read_bytes()
    private_files.create_secret(path, 32)
    assert path.read_bytes() == first
    assert list(home.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_cache_that_others_may_write(bundle: Path, home: Path, mode: int) -> None:
    """Such as /tmp, where another user could have put the key first."""
    home.mkdir()
    home.chmod(mode)
    with pytest.raises(DiskError, match=f"chmod.*{CACHE_VARIABLE}"):
        EngineCache(bundle).store(KEY, PLAN, 1.0)
    assert list(home.iterdir()) == []


def test_an_empty_variable_is_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/vqbet_edge")


def test_what_a_killed_process_left_is_swept(bundle: Path, plan: Path) -> None:
    """But not what another process may be writing just now, nor files of other names."""
    old, new = (plan.with_name(f".{plan.name}.{digit * 16}") for digit in "ab")
    other = plan.with_name(".something.plan")
    for path in (old, new, other):
        path.write_bytes(PLAN)
    for path in (old, other):
        os.utime(path, (0, 0))
    EngineCache(bundle).store(KEY, PLAN, 1.0)
    assert not old.exists()
    assert new.exists()
    assert other.exists()

"""Every way in which a stored engine can be wrong is found before TensorRT sees a byte of it."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends import private_files
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache, EngineKey
from vqbet_edge.runtime.backends.private_files import (
    CACHE_VARIABLE,
    RejectedError,
    check_owner,
    private_user_cache,
    user_cache,
)

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
ROOT, ROBOT, OTHER = 0, 1000, 1001
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def plan(cache: Path) -> Path:
    """A stored engine."""
    del cache
    return EngineCache().store(KEY, PLAN, 1.5)


def reason(key: EngineKey = KEY) -> str:
    found = EngineCache().find(key)
    assert found.plan is None
    assert found.path is None
    return found.reason


def test_what_was_stored_is_found() -> None:
    assert "no engine has been built for this device" in reason()
    assert str(user_cache()) in reason()
    plan = EngineCache().store(KEY, PLAN, 1.5)
    found = EngineCache().find(KEY)
    assert (found.plan, found.path, found.reason) == (PLAN, plan, "")
    assert plan.is_relative_to(user_cache() / "engines")
    # The robot takes any build options.
    assert EngineCache().find(msgspec.structs.replace(KEY, options=None)).plan == PLAN
    assert "options" in reason(msgspec.structs.replace(KEY, options=BuildOptions(1024, 3)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("tensorrt", "10.13.3"), ("gpu", "Thor"), ("compute_capability", "11.0"),
     ("flavour", "tensorrt_rtx"), ("graph_sha256", "cd" * 32), ("stage", "code_heads"),
     ("driver", "13.0")],
)  # fmt: skip
def test_another_device_or_graph(plan: Path, cache: Path, field: str, value: str) -> None:
    """Has another place; an engine that was moved there is known by its record."""
    wanted = msgspec.structs.replace(KEY, **{field: value})
    assert ("built for driver" if field == "driver" else "no engine") in reason(wanted)
    folder = cache / "engines" / wanted.device
    folder.mkdir(mode=0o700, exist_ok=True)
    for suffix in (".plan", ".json"):
        plan.with_suffix(suffix).rename(folder / (wanted.file_stem + suffix))
    assert f"built for {field}" in reason(wanted)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda plan: plan.write_bytes(PLAN[::-1]), "altered"),
        (lambda plan: plan.write_bytes(PLAN[:-1] + bytes([PLAN[-1] ^ 1])), "altered"),
        (lambda plan: plan.write_bytes(PLAN[:-1]), "truncated"),
        (lambda plan: plan.write_bytes(PLAN + b"\0"), "larger than expected"),
        (lambda plan: plan.unlink(), "cannot be read"),
        (lambda plan: (plan.unlink(), os.mkfifo(plan, 0o600)), "not a regular file"),
        (lambda plan: (plan.unlink(), plan.mkdir(mode=0o700)), "not a regular file"),
        (lambda plan: plan.parent.chmod(0o777), "somebody else"),
    ],
    ids=["exchanged", "flipped", "truncated", "longer", "missing", "pipe", "folder", "open folder"],
)
def test_a_plan_that_is_not_what_was_stored(plan: Path, damage: Any, told: str) -> None:
    damage(plan)
    assert told in reason()


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"key": 1}', '{"seal": "\xff"}'])
def test_a_damaged_record(plan: Path, text: str) -> None:
    plan.with_suffix(".json").write_bytes(text.encode("latin-1"))
    assert reason()


@pytest.mark.parametrize("suffix", [".plan", ".json"])
def test_files_that_others_may_write_and_links_are_not_read(
    plan: Path, tmp_path: Path, suffix: str
) -> None:
    file, target = plan.with_suffix(suffix), tmp_path / "elsewhere"
    for mode in (0o620, 0o602):
        file.chmod(mode)
        assert "somebody else" in reason()
    file.chmod(0o600)
    file.rename(target)
    file.symlink_to(target)
    assert "cannot be read" in reason()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_above_that_others_may_write(plan: Path, tmp_path: Path, mode: int) -> None:
    """Whoever may write there can put another folder in this one's place."""
    tmp_path.chmod(mode)
    assert f"'{tmp_path}' can be written by somebody else" in reason()
    # Unless nobody may rename what is not theirs, as in /tmp.
    tmp_path.chmod(mode | 0o1000)
    assert EngineCache().find(KEY).path == plan


def test_a_cache_behind_a_link(
    plan: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another disk, say; what counts is where it leads."""
    (tmp_path / "link").symlink_to(cache)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "link"))
    assert EngineCache().find(KEY).plan == PLAN
    plan.parent.chmod(0o777)
    assert "somebody else" in reason()


def test_nowhere_to_write(cache: Path) -> None:
    """A file in its place; or where another user, as in /tmp, could have put engines first."""
    cache.touch()
    with pytest.raises(DiskError, match=CACHE_VARIABLE) as caught:
        EngineCache().store(KEY, PLAN, 1.0)
    assert caught.value.exit_code == 5
    cache.unlink()
    cache.mkdir()
    for mode in (0o777, 0o1777, 0o770):
        cache.chmod(mode)
        with pytest.raises(DiskError, match=f"chmod.*{CACHE_VARIABLE}"):
            EngineCache().store(KEY, PLAN, 1.0)
    assert list(cache.iterdir()) == []


# Dies at the n-th rename: 1 is the plan's, 2 the record's.
KILLED = """
import msgspec, os, signal, sys
from pathlib import Path
from vqbet_edge.runtime.backends.engine_cache import EngineCache, EngineKey
replace, left = Path.replace, [int(sys.argv[1])]
def dying(self, target):
    left[0] -= 1
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = dying
EngineCache().store(msgspec.json.decode(sys.argv[2], type=EngineKey), bytes(1000), 1.0)
"""


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("before", [False, True])
def test_killed_while_writing(rename: int, before: bool) -> None:
    """An engine that was there is replaced whole, or found out; never half of each is loaded."""
    if before:
        EngineCache().store(KEY, PLAN, 1.0)
    arguments = [str(rename), msgspec.json.encode(KEY).decode()]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments]).returncode == -9
    found = EngineCache().find(KEY)
    if before and rename == 1:
        assert found.plan == PLAN
    elif before:
        assert "altered" in found.reason or "larger" in found.reason
    else:
        assert "no engine" in found.reason
    assert EngineCache().store(KEY, PLAN, 1.0)
    assert EngineCache().find(KEY).plan == PLAN


@pytest.mark.parametrize("own", ["", None])
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    """An empty variable is no directory."""
    monkeypatch.delenv(CACHE_VARIABLE)
    if own is not None:
        monkeypatch.setenv(CACHE_VARIABLE, own)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/vqbet_edge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == Path.home() / ".cache/vqbet_edge"


def test_what_a_killed_process_left_is_swept(plan: Path) -> None:
    """But not what another process may be writing just now, nor files of other names."""
    old, new = (plan.with_name(f".{plan.name}.{digit * 16}") for digit in "ab")
    other = plan.with_name(".something.plan")
    for path in (old, new, other):
        path.write_bytes(PLAN)
    for path in (old, other):
        os.utime(path, (0, 0))
    EngineCache().store(KEY, PLAN, 1.0)
    assert [path.exists() for path in (old, new, other)] == [False, True, True]


# Whose engines may be loaded: root's and one's own, from where nobody else may write.


def accepted(user: int, owner: int, mode: int, *, above: bool = False) -> bool:
    status: Any = SimpleNamespace(st_uid=owner, st_mode=stat.S_IFDIR | mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_files.os, "geteuid", lambda: user)
        try:
            check_owner(Path("/there"), status, above=above)
        except RejectedError:
            return False
    return True


@pytest.mark.parametrize(
    ("user", "owner", "expected"),
    [(ROBOT, ROBOT, True), (ROBOT, ROOT, True), (ROBOT, OTHER, False),
     (ROOT, ROOT, True), (ROOT, ROBOT, False)],
)  # fmt: skip
def test_whose_files_are_trusted(user: int, owner: int, expected: bool) -> None:
    for mode in (0o755, 0o700, 0o644, 0o444):
        assert accepted(user, owner, mode) is expected
        assert accepted(user, owner, mode, above=True) is expected
    for mode in (0o775, 0o757, 0o777, 0o622, 0o1777):
        assert not accepted(user, owner, mode)
    assert not accepted(user, owner, 0o777, above=True)
    assert accepted(user, owner, 0o1777, above=True) is expected


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_what_is_created_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    """Ubuntu's users have the umask 002, with which `mkdir` lets a group write."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "missing" / "cache"))
    before = os.umask(umask)
    try:
        plan = EngineCache().store(KEY, b"plan", 1.0)
    finally:
        os.umask(before)
    assert EngineCache().find(KEY).plan == b"plan"
    for path in (plan, plan.with_suffix(".json")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644 & ~umask
    for path in plan.relative_to(tmp_path).parents:
        if path != Path():
            assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o755 & ~umask


def test_a_cache_that_only_root_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the answer of the operating system is given here."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(private_files.os, "access", lambda _path, _mode: False)
    with pytest.raises(DiskError, match=f"this user may not write there.*{CACHE_VARIABLE}"):
        private_user_cache()


# Another user's process: imports first, for the interpreter may lie where only root may look.
AS_USER = """
import msgspec, os, sys
from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends.engine_cache import EngineCache, EngineKey
key = msgspec.json.decode(sys.argv[2], type=EngineKey)
os.setgid(int(sys.argv[1])), os.setuid(int(sys.argv[1]))
if sys.argv[3] == "store":
    try: EngineCache().store(key, b"theirs", 1.0)
    except DiskError as error: print(error)
found = EngineCache().find(key)
print(found.plan.decode() if found.plan else found.reason)
"""


@pytest.fixture
def open_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that others can reach, as /opt/engines of a robot's image."""
    if os.geteuid() != ROOT:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp(prefix="vqbet-engines-"))
    folder.chmod(0o755)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    yield folder / "cache"
    shutil.rmtree(folder)


def as_user(user: int, action: str = "find") -> str:
    arguments = [str(user), msgspec.json.encode(KEY).decode(), action]
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_root_builds_and_a_service_user_runs(open_cache: Path) -> None:
    """As when a robot's image is made."""
    EngineCache().store(KEY, b"root's", 1.0)
    assert as_user(ROBOT) == "root's\n"
    refused = as_user(ROBOT, "store")
    assert refused.startswith(f"nothing can be kept in the cache '{open_cache}/engines/")
    assert refused.endswith("root's\n")


def test_what_a_user_builds_root_does_not_run(open_cache: Path) -> None:
    open_cache.mkdir(mode=0o755)
    os.chown(open_cache, ROBOT, ROBOT)
    assert as_user(ROBOT, "store") == "theirs\n"
    assert "belongs to user 1000, expected user 0" in EngineCache().find(KEY).reason
    assert "belongs to user 1000, expected user 0 or 1001" in as_user(OTHER)
    # Handing them over is a decision of root's, and enough.
    for path in (open_cache, *open_cache.rglob("*")):
        os.chown(path, ROOT, ROOT)
    assert EngineCache().find(KEY).plan == b"theirs"
    assert as_user(OTHER) == "theirs\n"


def test_one_file_of_another_user_among_roots(open_cache: Path) -> None:
    plan = EngineCache().store(KEY, b"root's", 1.0)
    os.chown(plan, OTHER, OTHER)
    assert "belongs to user 1001" in as_user(ROBOT)
    os.chown(plan, ROOT, ROOT)
    plan.chmod(0o600)
    assert "cannot be read (Permission denied)" in as_user(ROBOT)
    open_cache.chmod(0o700)
    assert "cannot be read (Permission denied)" in as_user(ROBOT)

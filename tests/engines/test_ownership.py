"""Whose engines may be loaded: root's and one's own, from where nobody else may write."""

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

import pytest

from vqbet_edge.errors import DiskError
from vqbet_edge.runtime.backends import private_files
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache, EngineKey
from vqbet_edge.runtime.backends.private_files import (
    CACHE_VARIABLE,
    RejectedError,
    check_folder,
    check_owner,
    private_user_cache,
)

ROOT, ROBOT, OTHER = 0, 1000, 1001
KEY = EngineKey("gpt", "ab" * 32, "tensorrt", "10.3.0", "Orin", "8.7", "12.6", BuildOptions(512, 3))


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


def test_the_reason_names_folder_and_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_files.os, "geteuid", lambda: ROBOT)
    status: Any = SimpleNamespace(st_uid=OTHER, st_mode=0o755)
    with pytest.raises(RejectedError, match=r"'/opt/engines' belongs to user 1001.*0 or 1000"):
        check_owner(Path("/opt/engines"), status)


def test_every_folder_above_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another user sees it whose are none of them."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    looked_at = []
    monkeypatch.setattr(
        private_files, "check_owner", lambda path, _status, **_above: looked_at.append(path)
    )
    check_folder(folder)
    assert looked_at == [folder, *folder.parents]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
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


def test_engines_in_a_bundle_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded bundle can bring some with correct digests; they are code all the same."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "test.bundle"))
    EngineCache().store(KEY, b"evil", 1.0)
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "test.bundle")
    assert EngineCache().find(KEY).plan is None


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
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that others can reach, as /opt/engines of a robot's image."""
    if os.geteuid() != ROOT:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp(prefix="vqbet-engines-"))
    folder.chmod(0o755)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    yield folder / "cache"
    shutil.rmtree(folder)


def as_user(user: int, action: str = "find") -> str:
    import msgspec

    arguments = [str(user), msgspec.json.encode(KEY).decode(), action]
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_root_builds_and_a_service_user_runs(cache: Path) -> None:
    """As when a robot's image is made."""
    EngineCache().store(KEY, b"root's", 1.0)
    assert as_user(ROBOT) == "root's\n"
    refused = as_user(ROBOT, "store")
    assert refused.startswith(f"nothing can be kept in the cache '{cache}/engines/")
    assert refused.endswith("root's\n")


def test_what_a_user_builds_root_does_not_run(cache: Path) -> None:
    cache.mkdir(mode=0o755)
    os.chown(cache, ROBOT, ROBOT)
    assert as_user(ROBOT, "store") == "theirs\n"
    assert "belongs to user 1000, expected user 0" in EngineCache().find(KEY).reason
    assert "belongs to user 1000, expected user 0 or 1001" in as_user(OTHER)
    # Handing them over is a decision of root's, and enough.
    for path in (cache, *cache.rglob("*")):
        os.chown(path, ROOT, ROOT)
    assert EngineCache().find(KEY).plan == b"theirs"
    assert as_user(OTHER) == "theirs\n"


def test_one_file_of_another_user_among_roots(cache: Path) -> None:
    plan = EngineCache().store(KEY, b"root's", 1.0)
    os.chown(plan, OTHER, OTHER)
    assert "belongs to user 1001" in as_user(ROBOT)
    os.chown(plan, ROOT, ROOT)
    plan.chmod(0o600)
    assert "cannot be read (Permission denied)" in as_user(ROBOT)
    cache.chmod(0o700)
    assert "cannot be read (Permission denied)" in as_user(ROBOT)

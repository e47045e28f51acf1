"""`vqbet-doctor --prune`: what nothing here can load, and nothing else."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fake_driver import FakeDriver
from vqbet_engines import doctor_command, prune

from vqbet_edge.runtime.backends.cuda import VISIBLE_VARIABLE, Cuda
from vqbet_edge.runtime.backends.engine_cache import BuildOptions, EngineCache, EngineKey
from vqbet_edge.runtime.backends.private_files import private_user_cache

GPUS = "Orin", "Tesla T4"


@pytest.fixture
def keys(cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, EngineKey]:
    """Of engines in the cache, by what is the matter with them; two GPUs and one TensorRT here."""
    del cache
    driver = FakeDriver()
    driver.names = [name.encode() for name in GPUS]
    monkeypatch.delenv(VISIBLE_VARIABLE, raising=False)
    monkeypatch.setattr(prune, "create_cuda", lambda: Cuda(driver))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    device, options = Cuda(driver).device, BuildOptions()
    good = EngineKey("gpt", "ab" * 32, "tensorrt", "10.3.0", device.name,
                     device.compute_capability, device.driver, options)  # fmt: skip
    changed = {
        "good": {}, "another bundle": {"graph_sha256": "cd" * 32}, "second GPU": {"gpu": GPUS[1]},
        "library": {"tensorrt": "10.7.0"}, "flavour": {"flavour": "tensorrt_rtx"},
        "driver": {"driver": "12.5", "stage": "code_heads"},
        "GPU": {"gpu": "Thor"}, "capability": {"compute_capability": "8.6"},
    }  # fmt: skip
    keys = {name: msgspec.structs.replace(good, **each) for name, each in changed.items()}
    for key in keys.values():
        EngineCache().store(key, b"plan", 1.0)
    return keys


USABLE = {"good", "another bundle", "second GPU"}


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["vqbet-doctor", *options])
    with pytest.raises(SystemExit) as ended:
        doctor_command.main()
    return ended.value.code


def files(cache: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def place(cache: Path, key: EngineKey) -> Path:
    return cache / key.folder / f"{key.file_stem}.plan"


def test_what_cannot_be_loaded_is_listed_and_then_deleted(
    keys: dict[str, EngineKey], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = files(cache)
    assert not run(monkeypatch, "--prune")
    listed = capsys.readouterr().out
    assert files(cache) == before
    for name, key in keys.items():
        assert (str(place(cache, key)) in listed) == (name not in USABLE), name
    assert "tensorrt 10.7.0, Orin (8.7), driver 12.6" in listed
    assert "nothing was deleted; type: vqbet-doctor --prune --yes" in listed
    assert not run(monkeypatch, "--prune", "--yes")
    kept = {place(cache, keys[name]) for name in USABLE}
    left = files(cache)
    assert set(left) == kept | {path.with_suffix(".json") for path in kept}
    assert left.items() <= before.items()
    assert all(any(folder.iterdir()) for folder in (cache / "engines").iterdir())
    assert not run(monkeypatch, "--prune")
    assert "can be loaded here" in capsys.readouterr().out


def test_what_is_not_ours_is_not_touched(
    keys: dict[str, EngineKey], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = place(cache, keys["library"])
    # A record elsewhere, one without meaning, one that others may write, a link, a file of theirs.
    (cache / "engines" / "mine").mkdir(mode=0o755)
    moved = cache / "engines" / "mine" / old.with_suffix(".json").name
    moved.write_bytes(old.with_suffix(".json").read_bytes())
    damaged = cache / "engines" / "mine" / "notes.json"
    damaged.write_text("{}")
    theirs = place(cache, keys["GPU"])
    theirs.with_suffix(".json").chmod(0o666)
    elsewhere = tmp_path / "elsewhere.json"
    linked = place(cache, keys["capability"]).with_suffix(".json")
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    beside = old.with_name("readme.txt")
    beside.write_text("mine")
    assert not run(monkeypatch, "--prune", "--yes")
    for path in (moved, damaged, theirs, elsewhere, linked, linked.with_suffix(".plan"), beside):
        assert path.exists(), path
    assert not old.exists()
    private_user_cache()  # nothing became writable for others


@pytest.mark.parametrize(
    ("missing", "code", "said"),
    [("library", 6, "TensorRT cannot be imported"), ("GPU", 6, "NO_DEVICE"),
     ("hidden", 2, "env -u CUDA_VISIBLE_DEVICES vqbet-doctor --prune")],
)  # fmt: skip
def test_where_nobody_knows_nothing_is_deleted(
    keys: dict[str, EngineKey], cache: Path, monkeypatch: pytest.MonkeyPatch, missing: str,
    code: int, said: str, capsys: Any,
) -> None:  # fmt: skip
    del keys
    before = files(cache)
    match missing:
        case "library":
            monkeypatch.setitem(sys.modules, "tensorrt", None)
        case "GPU":
            monkeypatch.setattr(FakeDriver, "cuDeviceGet", lambda *_: (100, None))
            monkeypatch.setattr(prune, "create_cuda", lambda: Cuda(FakeDriver()))
            said = "failed"
        case _:
            monkeypatch.setenv(VISIBLE_VARIABLE, "0")
    assert run(monkeypatch, "--prune", "--yes") == code
    assert said in capsys.readouterr().err
    assert files(cache) == before


def test_yes_alone_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run(monkeypatch, "--yes") == 2
    assert "--yes goes with --prune" in capsys.readouterr().err


def test_what_this_user_may_not_delete(
    keys: dict[str, EngineKey], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    del keys

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert run(monkeypatch, "--prune", "--yes") == 5
    assert "gpt-abababababababab.plan': Permission denied" in capsys.readouterr().err

"""What is shown is what was recorded: the page in a browser, MCAP by its own reader."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from browser import Tab, chromium
from PIL import Image
from recordings import record
from safetensors.numpy import load_file, save_file

from examples.pusht.__main__ import ENLARGED, animate
from vqbet_edge import EdgePolicy
from vqbet_edge.errors import DatasetError, DiskError, UsageError
from vqbet_edge.runtime.extras import install_command
from vqbet_edge.runtime.recorded import RecordedEpisode, Recording
from vqbet_edge.runtime.recording_format import DECISION_ARRAYS, Outcome
from vqbet_edge.view.command import ViewConfig, view
from vqbet_edge.view.episodes import INDEX_NAME, EpisodeIndex, EpisodeOutcome, open_episodes


@pytest.fixture(scope="module")
def recorded(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(mini, tmp_path_factory.mktemp("view") / "seen")


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium() as tab:
        yield tab


def show(recorded: Recording, tmp_path: Path, **options: Any) -> Path:
    return view(ViewConfig(recorded.folder, output=tmp_path / "shown", **options))


def page(recorded: Recording, tmp_path: Path, **options: Any) -> Path:
    path = show(recorded, tmp_path, **options)
    return path.rename(path.with_suffix(".html"))


def data(path: Path) -> Any:
    text = path.read_text().split('id="data">')[1].split("</script>")[0]
    return json.loads(text)


@pytest.mark.extended
def test_the_page_shows_every_step(recorded: Recording, tmp_path: Path, tab: Tab) -> None:
    path = page(recorded, tmp_path)
    for width in (1200, 360):
        tab.open(path, width)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.querySelectorAll('option')].map(o => o.textContent)") == [
        "episode 1",
        "episode 2",
        "episode 3",
    ]
    episode = recorded.episodes[0]
    for row in range(len(episode)):
        move(tab, row)
        assert tab.evaluate("$('where').textContent").startswith(f"step {episode.steps[row]}, ")
        decision = episode.decisions[max(r for r in episode.decisions if r <= row)]
        primary, secondary = decision.codes
        assert f"codes ({primary}, {secondary}), " in tab.evaluate("$('decision').textContent")
    shown = "document.querySelector('img').decode().then(() => document.querySelector('img')"
    assert tab.evaluate(f"{shown}.naturalWidth)") == miniature.SIZE
    drawn = tab.evaluate(
        "[...document.querySelectorAll('canvas')].map(c => new Set(c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data).size)"
    )
    assert len(drawn) == 6
    assert min(drawn) > 2  # none is empty
    tab.evaluate("$('episode').value = 2; $('episode').dispatchEvent(new Event('change'))")
    assert "act raised" in tab.evaluate("$('where').textContent")
    assert tab.evaluate("$('decision').textContent") == "none yet"
    assert tab.complaints == []
    assert set(tab.requests) == {path.resolve().as_uri()}
    tab.requests.clear()


def move(tab: Tab, row: int) -> None:
    tab.evaluate(f"$('row').value = {row}; $('row').dispatchEvent(new Event('input'))")


def test_the_pages_figures_are_the_recordings(recorded: Recording, tmp_path: Path) -> None:
    shown = data(page(recorded, tmp_path))["episodes"]
    assert len(shown) == len(recorded.episodes)
    for got, episode in zip(shown, recorded.episodes, strict=True):
        assert got["steps"] == episode.steps.tolist()
        assert got["outcomes"] == episode.outcomes.tolist()
        for name, expected in (
            ("actions", episode.actions),
            ("states", episode.states),
            ("milliseconds", episode.seconds * 1e3),
        ):
            np.testing.assert_allclose(np.array(got[name], np.float64), expected, rtol=1e-4)
        assert [d["row"] for d in got["decisions"]] == list(episode.decisions)
        for d, expected in zip(got["decisions"], episode.decisions.values(), strict=True):
            assert d["codes"] == expected.codes.tolist()
            np.testing.assert_allclose(d["chunk"], expected.action_chunk, rtol=1e-4)
            for layer, codes in enumerate(got["codes"]):
                probabilities = expected.code_probabilities[layer][codes]
                np.testing.assert_allclose(d["probabilities"][layer], probabilities, rtol=1e-4)
        ((row, uri), *_), *_ = got["frames"].values()
        assert row == 0
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert image.size == (miniature.SIZE, miniature.SIZE)


def test_a_page_keeps_to_its_size(mini: Path, tmp_path: Path) -> None:
    """Frames are left out evenly, then the beginnings of episodes; the page says so."""
    recorded = record(mini, tmp_path / "seen", (2500, 2500, 2500, 400))
    path = page(recorded, tmp_path, megabytes=1)
    assert 0.5e6 < path.stat().st_size < 1.05e6
    shown = data(path)
    first = shown["episodes"][0]
    frames = [row for row, _ in first["frames"][miniature.IMAGE]]
    assert len(set(np.diff(frames))) == 1
    assert frames[1] > 1
    kept = sum(len(episode["steps"]) for episode in shown["episodes"])
    assert kept < 7901
    assert shown["leftOut"] + len(shown["episodes"]) == 5
    last = shown["episodes"][-1]
    assert last["missing"] > 0
    assert last["steps"][-1] == recorded.episodes[len(shown["episodes"]) - 1].steps[-1]


@pytest.mark.extended
def test_names_from_a_recording_run_no_script(
    recorded: Recording, tmp_path: Path, tab: Tab
) -> None:
    """A recording may come from anybody."""
    folder = tmp_path / "</title><script>alert(1)</script>"
    shutil.copytree(recorded.folder, folder)
    for path in folder.iterdir():
        info = json.loads(metadata(path))
        info["policy"]["bundle"] = "</script><img src=x onerror=alert(1)>"
        save_file(load_file(path), path, {"recording": json.dumps(info)})
    path = page(Recording(folder), tmp_path)
    tab.requests.clear()
    tab.open(path, 360)
    assert "<img src=x" in tab.evaluate("$('about').textContent")
    assert tab.evaluate("document.querySelectorAll('script').length") == 2
    assert tab.complaints == []
    assert set(tab.requests) == {path.resolve().as_uri()}


def write_first(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    if array.dtype.kind == "i":
        value = min(int(value), np.iinfo(array.dtype).max)
    changed.reshape(-1)[0] = value
    return changed


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_numbers_that_no_recorder_writes(recorded: Recording, tmp_path: Path, value: float) -> None:
    """Refused, or shown by every output; NaN is null where it says that there was none."""
    source = next(recorded.folder.glob("observations_*.safetensors"))
    arrays, shown = load_file(source), 0
    for key in [key for key, array in arrays.items() if array.dtype.kind in "fi"]:
        if arrays[key].dtype.kind == "i" and not np.isfinite(value):
            continue
        folder = tmp_path / key
        folder.mkdir()
        with np.errstate(invalid="ignore"):
            changed = {**arrays, key: write_first(arrays[key], value)}
        save_file(changed, folder / source.name, {"recording": metadata(source)})
        try:
            found = Recording(folder)
        except DatasetError:
            continue
        assert not np.isinf(value), key
        for to in ("html", "mcap"):
            pytest.importorskip({"html": "PIL"}.get(to, to))
            assert show(found, folder, to=to).is_file()
        shown += 1
    assert shown or abs(value) > 1


def metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return str(file.metadata()["recording"])


def test_mcap_reads_back_equal(recorded: Recording, tmp_path: Path) -> None:
    reader = pytest.importorskip("mcap.reader")
    messages: dict[str, list[tuple[int, Any]]] = {}
    schemas = {}
    with show(recorded, tmp_path, to="mcap").open("rb") as file:
        for schema, channel, message in reader.make_reader(file).iter_messages():
            assert (schema.encoding, channel.message_encoding) == ("jsonschema", "json")
            schemas[channel.topic.split("/")[2]] = schema.name
            found = messages.setdefault(channel.topic, [])
            found.append((message.log_time, json.loads(message.data)))
    assert schemas == {
        "camera": "foxglove.CompressedImage",
        "step": "vqbet_edge.Step",
        "decision": "vqbet_edge.Decision",
        "mark": "vqbet_edge.Mark",
    }
    for place, episode in enumerate(recorded.episodes):
        root = f"/episode_{place:03}"
        steps = messages[f"{root}/step"]
        assert [time for time, _ in steps] == episode.times.tolist()
        assert [m["step"] for _, m in steps] == episode.steps.tolist()
        assert [m["outcome"] for _, m in steps] == [Outcome(o).name for o in episode.outcomes]
        for key, expected in (("state", episode.states), ("action", episode.actions)):
            got = np.array([m[key] for _, m in steps], np.float32)
            np.testing.assert_array_equal(got, expected)
        seconds = np.array([m["seconds"] for _, m in steps], np.float64)
        np.testing.assert_array_equal(seconds, episode.seconds)
        images = messages[f"{root}/camera/{miniature.IMAGE}"]
        assert len(images) == len(episode)
        for row, (time, m) in enumerate(images):
            stamp = m["timestamp"]
            assert stamp["sec"] * 10**9 + stamp["nsec"] == time == episode.times[row]
            assert (m["format"], m["frame_id"]) == ("png", miniature.IMAGE)
            same_frame(base64.b64decode(m["data"]), episode, row)
        marked = [
            (mark.time, {"step": int(episode.steps[row]), "text": mark.text})
            for row, marks in episode.marks.items()
            for mark in marks
        ]
        assert messages.get(f"{root}/mark", []) == marked
        made = messages.get(f"{root}/decision", [])
        assert [m["step"] for _, m in made] == [d.step for d in episode.decisions.values()]
        for (_, m), expected in zip(made, episode.decisions.values(), strict=True):
            for name in DECISION_ARRAYS:
                array = getattr(expected, name)
                np.testing.assert_array_equal(np.array(m[name], array.dtype), array)
            assert m["seconds"] == expected.seconds


def same_frame(png: bytes, episode: RecordedEpisode, row: int) -> None:
    got = np.asarray(Image.open(io.BytesIO(png)))
    np.testing.assert_array_equal(got, episode.frame(miniature.IMAGE, row))


def evaluation(mini: Path, folder: Path) -> list[str]:
    """As `vqbet-eval --record` leaves it; the names in the order of the view."""
    ended = [("solved_3", True, 1.0), ("failed_1", False, 0.4), ("failed_2", False, 0.1)]
    for name, _, _ in ended:
        record(mini, folder / name, (3,))
    outcomes = [EpisodeOutcome(n, int(n[-1]), ok, reward, 3) for n, ok, reward in ended]
    (folder / INDEX_NAME).write_bytes(EpisodeIndex.of("pusht", "a.bundle", outcomes).encode())
    return ["failed_2", "failed_1", "solved_3"]


def test_failures_come_first(mini: Path, tmp_path: Path) -> None:
    expected = evaluation(mini, tmp_path / "episodes")
    record(mini, tmp_path / "episodes" / "running_4", (3,))
    shown = open_episodes(tmp_path / "episodes")
    # `record` makes an episode of its own for the error.
    names = [one.recording.folder.name for one in shown[::2]]
    assert names == [*expected, "running_4"]
    assert shown[0].name == "failed, seed 2, reward 0.1"
    assert open_episodes(tmp_path / "episodes", [2])[0].name == "failed, seed 1, reward 0.4"


@pytest.mark.extended
def test_the_page_opens_on_an_episode_that_succeeded(mini: Path, tmp_path: Path, tab: Tab) -> None:
    evaluation(mini, tmp_path / "episodes")
    tab.open(view(ViewConfig(tmp_path / "episodes")), 1200)
    chosen = tab.evaluate("$('episode').selectedOptions[0].textContent")
    assert chosen == "solved, seed 3, reward 1"
    assert tab.complaints == []


def test_the_demo_animates_an_episode_that_succeeded(mini: Path, tmp_path: Path) -> None:
    evaluation(mini, tmp_path / "episodes")
    pages = [data(view(ViewConfig(tmp_path / "episodes", episodes=e))) for e in ((), (0, 1))]
    assert [one["opened"] for one in pages] == [4, 0]  # behind the failures, with their errors
    assert animate(tmp_path / "episodes", tmp_path / "a.webp") == "solved, seed 3, reward 1"
    with Image.open(tmp_path / "a.webp") as animation:
        assert animation.n_frames == 3  # type: ignore[attr-defined]
        assert animation.size == (ENLARGED * miniature.SIZE,) * 2
    (tmp_path / "episodes" / INDEX_NAME).unlink()
    assert animate(tmp_path / "episodes", tmp_path / "a.webp").startswith("episode 1")


def test_an_index_opens_nothing_by_name(mini: Path, tmp_path: Path) -> None:
    record(mini, tmp_path / "outside", (3,))
    record(mini, tmp_path / "episodes" / "failed_1", (3,))
    outcomes = [EpisodeOutcome("../outside", 1, False, 0.0, 3)]
    index = EpisodeIndex.of("pusht", "a.bundle", outcomes)
    (tmp_path / "episodes" / INDEX_NAME).write_bytes(index.encode())
    shown = open_episodes(tmp_path / "episodes")
    assert {one.recording.folder.name for one in shown} == {"failed_1"}
    (tmp_path / "episodes" / INDEX_NAME).write_text("[]")
    with pytest.raises(DatasetError, match="no index of episodes"):
        open_episodes(tmp_path / "episodes")


@pytest.mark.parametrize(
    ("to", "module", "extra"), [("html", "PIL", "view"), ("mcap", "mcap.writer", "mcap")]
)
def test_a_missing_extra_is_named(
    recorded: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    to: Any, module: str, extra: str,
) -> None:  # fmt: skip
    for name in ("to_html", "to_mcap", "images"):
        monkeypatch.delitem(sys.modules, f"vqbet_edge.view.{name}", raising=False)
        monkeypatch.delattr(f"vqbet_edge.view.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=re.escape(install_command(extra))):
        show(recorded, tmp_path, to=to)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_shown_is_said(recorded: Recording, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no recording"):
        view(ViewConfig(tmp_path))
    with pytest.raises(UsageError, match=r"--episodes 9: .* has 0 to 2"):
        show(recorded, tmp_path, episodes=(9,))
    with pytest.raises(UsageError, match="--megabytes must be at least 1, got 0"):
        ViewConfig(tmp_path, megabytes=0)
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot write"):
        view(ViewConfig(recorded.folder, output=tmp_path / "file" / "page.html"))


def test_the_command_needs_no_torch(recorded: Recording, tmp_path: Path) -> None:
    script = """
import sys
from vqbet_edge.view.command import main
try:
    main()
finally:
    assert not {"torch", "onnxruntime"} & set(sys.modules)
"""
    command = [sys.executable, "-c", script, str(recorded.folder), "-o", str(tmp_path / "a.html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'a.html'}\n"), done.stderr
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_without_a_name_it_lies_beside_the_recording(mini: Path, tmp_path: Path) -> None:
    policy = EdgePolicy.load(mini)
    with policy.record(tmp_path / "seen.now", decisions=True):
        policy.act(miniature.observation(np.random.default_rng(0)))
    assert view(ViewConfig(tmp_path / "seen.now")) == tmp_path / "seen.now.html"

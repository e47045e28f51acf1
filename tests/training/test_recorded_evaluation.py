"""`vqbet-eval --record`: a recording for every episode, failures first."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from workshop import Exported, Workshop

from vqbet_edge.errors import UsageError
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.evaluation.actors import Siblings
from vqbet_edge.training.evaluation.cli import main
from vqbet_edge.training.evaluation.detour import IMAGE_SIZE, DetourEnv
from vqbet_edge.training.evaluation.recordings import RecordingActor
from vqbet_edge.training.evaluation.rollout import Episode, run_episodes
from vqbet_edge.view.episodes import INDEX_NAME, open_episodes

IMAGE, STATE = "observation.image", "observation.state"
SEEDS = range(5)


@pytest.fixture(scope="module")
def exported(workshop: Workshop) -> Exported:
    """An untrained policy with the detour's features."""
    case = oracle.small("detour", image=(IMAGE_SIZE, IMAGE_SIZE), crop_shape=(56, 56))
    return workshop.bundle(case)


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Path:
    return exported.bundle


class SomeSucceed(DetourEnv):
    """As the detour, but scenes of odd seeds are solved, whatever the policy does."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._odd = bool(seed is not None and seed % 2)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        observation, _, _, truncated, _ = super().step(action)
        done = truncated or self._steps >= 7
        return observation, float(self._odd), done, truncated, {"is_success": self._odd}


def drive(bundle: Path, folder: Path, seeds: range = SEEDS) -> list[Episode]:
    actor = Siblings(*load_backend(str(bundle), "onnxruntime"), 2)
    recording = RecordingActor(actor, folder, "detour", bundle.name, seeds)
    return run_episodes(SomeSucceed, recording, seeds, slots=2, on_end=recording.ended)


@pytest.mark.parametrize("kind", ["bundle", "checkpoint"])
def test_every_episode_is_recorded_and_failures_come_first(
    exported: Exported, tmp_path: Path, kind: str
) -> None:
    """The recording changes none of them."""
    policy = getattr(exported, kind)
    episodes = drive(policy, tmp_path / "episodes")
    plain = run_episodes(
        SomeSucceed, Siblings(*load_backend(str(policy), "onnxruntime"), 2), SEEDS, slots=2
    )
    for a, b in zip(episodes, plain, strict=True):
        np.testing.assert_array_equal(a.states, b.states)
    names = sorted(path.name for path in (tmp_path / "episodes").iterdir())
    assert names == [INDEX_NAME, "failed_0", "failed_2", "failed_4", "solved_1", "solved_3"]
    index = json.loads((tmp_path / "episodes" / INDEX_NAME).read_text())
    assert [e["folder"] for e in index["episodes"]] == names[1:]
    shown = open_episodes(tmp_path / "episodes")
    assert [one.recording.folder.name for one in shown] == names[1:]
    by_seed = {episode.seed: episode for episode in episodes}
    for one in shown:
        assert one.outcome is not None
        episode = by_seed[one.outcome.seed]
        assert (one.outcome.success, one.outcome.steps) == (episode.success, episode.steps)
        np.testing.assert_array_equal(one.episode.states, episode.states)
        assert one.recording.policy.seed == one.outcome.seed
        assert one.episode.steps[0] == 0
        assert one.episode.decisions


def test_what_was_running_at_the_end_is_kept(bundle: Path, tmp_path: Path) -> None:
    actor = Siblings(*load_backend(str(bundle), "onnxruntime"), 1)
    recording = RecordingActor(actor, tmp_path / "episodes", "detour", "a", range(1))
    recording.reset(0, seed=0)
    env = DetourEnv()
    observation, _ = env.reset(seed=0)
    recording.act({key: value[None] for key, value in observation.items()})
    recording.close()
    (one,) = open_episodes(tmp_path / "episodes")
    assert one.recording.folder.name == "running_0"
    assert len(one.episode) == 1


def test_a_folder_that_holds_something_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(UsageError, match="is not empty"):
        RecordingActor(Siblings(*load_backend(str(bundle)), 1), tmp_path, "detour", "a", SEEDS)


def test_the_commands_together(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Drive and record, then replay what was recorded: nothing differs."""
    folder = str(tmp_path / "episodes")
    printed = []
    for flags in (["--env", "detour", "--episodes", "3", "--record", folder], ["--replay", folder]):
        arguments = [str(bundle), "--backend", "onnxruntime", "--json", *flags]
        monkeypatch.setattr(sys, "argv", ["vqbet-eval", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0]["policies"][str(bundle)]["episodes"] == 3
    assert printed[1]["decisions"] > 0
    assert (printed[1]["differing"], printed[1]["near_ties"], printed[1]["first"]) == (0, 0, None)

"""The report on codes: its figures against figures computed another way."""

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import codes
import miniature
import numpy as np
import pytest
import scipy.stats
import torch
import two_ways
from safetensors.torch import load_file, save_file

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import DatasetError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.bundle import DECODE_TABLE, Bundle
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.codes import cli
from vqbet_edge.training.codes.findings import judge
from vqbet_edge.training.codes.modes import LIVE, Considered, joint, merge
from vqbet_edge.training.codes.policies import CodedPolicy
from vqbet_edge.training.codes.report import chosen_places, examine_codes
from vqbet_edge.training.codes.use import LayerUse
from vqbet_edge.training.dataset import LeRobotDataset
from vqbet_edge.training.dataset.samples import Place, open_source
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.objectives import PixelScaling

# One worker trains the policy for all.
pytestmark = pytest.mark.xdist_group("two_ways")

WEIGHTS = "model.safetensors"
BOOK = "vqbet.action_head.vqvae_model.vq_layer.layers.{}._codebook.embed"


@pytest.fixture(scope="module")
def trained(two_ways_run: Path) -> Path:
    return two_ways_run / "run/checkpoints/last/pretrained_model"


@pytest.fixture(scope="module")
def data(two_ways_run: Path) -> Path:
    return two_ways_run / "data"


@pytest.fixture(scope="module")
def found(trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report's JSON."""
    return codes.report(trained, data, tmp_path_factory.mktemp("page") / "codes.html")[0]


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return codes.write_random(tmp_path_factory.mktemp("noise") / "data")


def altered(trained: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    copy = Path(shutil.copytree(trained, target))
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file(tensors, copy / WEIGHTS)
    return copy


def by_hand(data: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Demonstrated chunks, normalised to [-1, 1], in one array and by episode."""
    dataset = LeRobotDataset.open(data)
    actions = dataset.column("action").astype(np.float64)
    low, high = actions.min(axis=0), actions.max(axis=0)
    half = (high - low) / 2
    half[half == 0] = 1
    episodes = []
    for first, last in zip(dataset.bounds[:-1], dataset.bounds[1:], strict=True):
        rows = []
        for step in range(first, last):
            window = [actions[min(step + i, last - 1)] for i in range(two_ways.CHUNK)]
            rows.append([(action - low) / half - 1 for action in window])
        episodes.append(np.array(rows))
    return np.concatenate(episodes), episodes


# ---- What the report says about the task.


def test_two_modes_are_live_at_the_fork_and_one_elsewhere(found: Any) -> None:
    episodes = found["predictions"]["episodes"]
    assert len(episodes) == two_ways.EPISODES
    for episode in episodes:
        expected = [2 if step in two_ways.FORK else 1 for step in range(two_ways.STEPS)]
        assert episode["modes"] == expected
        for step, entropy in enumerate(episode["mode_entropy"]):
            if step in two_ways.FORK:
                assert entropy == pytest.approx(math.log(2), abs=0.02)
            else:
                assert entropy < 0.2
    share = len(two_ways.FORK) / two_ways.STEPS
    assert found["predictions"]["fork_share"] == pytest.approx(share)


def test_a_run_leaves_the_page_of_the_policy_that_it_saved(two_ways_run: Path, found: Any) -> None:
    own = json.loads((two_ways_run / "run/codes.json").read_text())
    assert (two_ways_run / "run/codes.html").read_text().startswith("<!DOCTYPE html>")
    for figures in (own, found):
        figures["policy"].pop("name")
    assert own == found


def test_a_collapsed_codebook_is_called_so(trained: Path, data: Path, tmp_path: Path) -> None:
    def same(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            tensors[BOOK.format(layer)][:] = tensors[BOOK.format(layer)][:, :1]

    collapsed = altered(trained, tmp_path / "collapsed", same)
    figures, findings = codes.report(collapsed, data, tmp_path / "with.html")
    assert figures["demonstrations"]["use"]["pairs"] == 1
    assert figures["demonstrations"]["use"]["pair_perplexity"] == 1
    assert findings["collapsed"].level == findings["coarse"].level == "problem"
    assert "--n-vqvae-training-steps" in findings["collapsed"].change
    assert "collapsed" in (tmp_path / "with.html").read_text()
    _, findings = codes.report(collapsed, None, tmp_path / "without.html")
    assert "collapsed" in findings


def test_each_figure_has_its_finding(noise: Path) -> None:
    report = codes.figures(codes.attentive(n_obs_steps=2), noise)

    def names(part: str, **figures: Any) -> dict[str, str]:
        changed = replace(report, **{part: replace(getattr(report, part), **figures)})
        return {finding.name: finding.level for finding in judge(changed)}

    for part, figure, bad, good, name, level in (
        ("demonstrations", "left_by_both", 0.5, 0.3, "coarse", "problem"),
        ("demonstrations", "spread", np.zeros(2), np.ones(2), "no_variety", "problem"),
        ("predictions", "offset_ratio", 1.1, 0.9, "offsets_dominate", "problem"),
        ("predictions", "offset_ratio", None, 0.9, "offsets_dominate", "problem"),
        ("predictions", "unseen_share", 0.06, 0.04, "unseen_pairs", "problem"),
        ("predictions", "fork_share", 0.6, 0.4, "undecided", "notice"),
    ):
        assert names(part, **{figure: bad})[name] == level
        assert name not in names(part, **{figure: good})
    use, one = report.demonstrations.use, LayerUse.of(np.array([9, 0, 0, 0, 0, 0, 0, 0]))
    lone = names("demonstrations", use=replace(use, layers=(one, one)), left_by_both=0.5)
    assert lone["collapsed"] == lone["dead_primary_codes"] == "problem"
    levels = list(lone.values())
    assert levels == sorted(levels, key=["problem", "notice", "healthy"].index)
    every = replace(use, layers=tuple(LayerUse.of(np.ones(8)) for _ in "12"))
    well = replace(
        report,
        demonstrations=replace(report.demonstrations, use=every, left_by_both=0.1),
        predictions=replace(report.predictions, fork_share=0.0, unseen_share=0.0, offset_ratio=0.5),
    )
    assert [finding.name for finding in judge(well)] == ["healthy"]


def test_demonstrations_without_variety_are_called_so(tmp_path: Path) -> None:
    frames = {miniature.IMAGE: np.zeros((6, 24, 24, 3), np.uint8)}
    still = frames | {miniature.STATE: np.zeros((6, 2), np.float32)}
    still |= {"action": np.full((6, 2), 11, np.float32)}
    write_dataset(tmp_path / "still", [still], fps=10, task="stand")
    report = codes.figures(miniature.checkpoint(), tmp_path / "still")
    assert "no_variety" in {finding.name for finding in judge(report)}


# ---- Demonstrations, with LeRobot's VQ-VAE and plain loops.


def test_use_and_reconstruction_are_lerobots(
    trained: Path, data: Path, found: Any, lerobot: Callable[[str], ModuleType]
) -> None:
    sizes = {"vqvae_n_embed": 8, "vqvae_embedding_dim": 16, "vqvae_enc_hidden_dim": 64}
    chunk = {"action_chunk_size": two_ways.CHUNK, "action_feature": SimpleNamespace(shape=(2,))}
    reference = lerobot("policies.vqbet.modeling_vqbet").VqVae(SimpleNamespace(**sizes, **chunk))
    prefix = "vqbet.action_head.vqvae_model."
    tensors = load_file(trained / WEIGHTS)
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    reference.load_state_dict(own)
    reference.eval()
    chunks, _ = by_hand(data)
    with torch.no_grad():
        latents, indices = reference.get_code(torch.from_numpy(chunks).float())
        both = reference.get_action_from_latent(latents).double().numpy()
        vectors = reference.vq_layer.get_codebook_vector_from_indices(indices)
        primary = reference.get_action_from_latent(vectors[0]).double().numpy()

    use = found["demonstrations"]["use"]
    counts = Counter(map(tuple, indices.tolist()))
    for (first, second), count in counts.items():
        assert use["pair_counts"][first][second] == count
    assert use["pairs"] == len(counts)
    entropy = scipy.stats.entropy(list(counts.values()))
    assert use["pair_perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)
    for layer, figures in enumerate(use["layers"]):
        each = Counter(indices[:, layer].tolist())
        assert figures["counts"] == [each[code] for code in range(8)]
        assert figures["dead"] == [code for code in range(8) if code not in each]
        perplexity = math.exp(scipy.stats.entropy(list(each.values())))
        assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-5)

    actions = LeRobotDataset.open(data).column("action")
    unit = (actions.max(axis=0) - actions.min(axis=0)) / 2
    lost = found["demonstrations"]
    spread = np.abs(chunks - chunks.mean(axis=0))
    for name, decoded in (("primary", primary), ("both", both)):
        error = np.abs(decoded - chunks)
        assert lost[name] == pytest.approx(list(error.mean(axis=(0, 1)) * unit), rel=1e-4, abs=1e-6)
        assert lost[f"left_by_{name}"] == pytest.approx(error.mean() / spread.mean(), rel=1e-4)
    assert found["demonstrations"]["spread"] == pytest.approx(
        list(spread.mean(axis=(0, 1)) * unit), rel=1e-5, abs=1e-6
    )


# ---- Predictions.


@pytest.mark.parametrize("fields", [{}, {"sequentially_select": True}, {"n_obs_steps": 1}])
def test_predictions_are_the_whole_networks(noise: Path, fields: dict[str, Any]) -> None:
    """Every window encoded anew, and pair by pair, in float64."""
    policy = miniature.checkpoint(bet_softmax_temperature=0.3, **fields)
    report = codes.figures(policy, noise)
    dataset, network, config = LeRobotDataset.open(noise), policy.network, policy.config
    scale = PixelScaling([policy.inputs[miniature.IMAGE]])
    for trace, episode in zip(report.predictions.episodes, range(3), strict=True):
        arrays = dataset.episode(episode)
        states = policy.inputs[miniature.STATE].apply(arrays[miniature.STATE])
        for step in range(len(states)):
            window = [max(0, step + 1 - config.n_obs_steps + i) for i in range(config.n_obs_steps)]
            images = torch.from_numpy(arrays[miniature.IMAGE][window])[None, :, None]
            with torch.no_grad():
                seen = network(scale(images), torch.from_numpy(states[window])[None])
                feature = seen[:, config.n_obs_steps - 1].expand(8, -1)
                logits = network.head.code_logits(feature, torch.arange(8))
                first, second = (logits.double() / 0.3).softmax(dim=-1).unbind(dim=1)
                pairs = (first[0, :, None] * second).numpy()
            expected = scipy.stats.entropy(pairs.ravel())
            assert trace.pair_entropy[step] == pytest.approx(expected, rel=1e-4)


def test_unseen_pairs_and_those_that_are_listed(found: Any) -> None:
    predictions = found["predictions"]
    seen, drawn = found["demonstrations"]["use"]["pair_counts"], predictions["pair_shares"]
    assert sum(map(sum, drawn)) == pytest.approx(1, abs=1e-4)
    unseen = {(i, j): drawn[i][j] for i in range(8) for j in range(8) if not seen[i][j]}
    assert predictions["unseen_share"] == pytest.approx(sum(unseen.values()), abs=1e-4)
    often = sorted((pair for pair in unseen if unseen[pair] >= 1e-3), key=lambda p: -unseen[p])
    assert [tuple(pair) for pair in predictions["unseen"]] == often
    listed = [(p["primary"], p["secondary"]) for p in found["pairs"]]
    used = sorted(
        ((i, j) for i in range(8) for j in range(8) if seen[i][j]), key=lambda p: -seen[p[0]][p[1]]
    )
    assert set(listed) == {*used, *often}
    assert [seen[i][j] for i, j in listed[: len(used)]] == [seen[i][j] for i, j in used]


def test_offsets_beside_what_codes_change(noise: Path) -> None:
    policy = codes.coded(codes.attentive(n_obs_steps=2))
    source = open_source(noise)
    report = examine_codes(policy, source, 2000)
    made = [
        d for i, n in enumerate(codes.LENGTHS) for d in policy.predict(source, Place(i, 0, n, i))
    ]
    decoded = np.stack([d.decoded_chunk for d in made]).astype(np.float64)
    offset = np.stack([d.offset_chunk for d in made]).astype(np.float64)
    assert report.predictions is not None
    changed = np.abs(decoded - decoded.mean(axis=0)).mean()
    expected = np.abs(offset).mean() / changed
    assert report.predictions.offset_ratio == pytest.approx(expected, rel=1e-5)


def test_modes_merge_what_decodes_to_the_same() -> None:
    chunks = {(0, 0): 0.0, (0, 1): 0.05, (1, 0): 1.0, (1, 1): 1.08, (2, 2): 5.0}
    probabilities = np.zeros((3, 3))
    for pair, probability in zip(chunks, (0.3, 0.2, 0.3, 0.15, 0.05), strict=True):
        probabilities[pair] = probability

    def decode(pairs: np.ndarray) -> np.ndarray:
        return np.array([np.full((2, 1), chunks[tuple(pair)]) for pair in pairs.tolist()])

    considered = [Considered.of(probabilities)]
    (modes,) = merge(considered, decode, tolerance=0.1)
    assert modes.live == 2  # the third has less than 10 %
    assert modes.entropy == pytest.approx(scipy.stats.entropy([0.5, 0.45, 0.05]))
    (apart,) = merge(considered, decode, tolerance=0.01)
    assert apart.live == sum(p >= LIVE for p in probabilities.flat)


# ---- Bundles, recordings, and what is refused.


@pytest.fixture(scope="module", params=[False, True], ids=["at_once", "sequential"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A policy as a checkpoint and as a bundle."""
    policy = miniature.checkpoint(n_obs_steps=3, sequentially_select=request.param)
    bundle = miniature.write(tmp_path_factory.mktemp("bundle") / "mini.bundle", policy)
    return policy, bundle


def test_a_bundle_tells_what_its_checkpoint_does(pair: Any, noise: Path, tmp_path: Path) -> None:
    """On the data, on a recording of it, and without a table."""
    policy, path = pair
    dataset = LeRobotDataset.open(noise)
    with EdgePolicy.load(path) as robot, robot.record(tmp_path / "seen"):
        for episode in range(dataset.num_episodes):
            arrays = dataset.episode(episode)
            robot.reset()
            for frame, state in zip(arrays[miniature.IMAGE], arrays[miniature.STATE], strict=True):
                robot.act({miniature.IMAGE: frame, miniature.STATE: state})
    checkpoint = codes.figures(policy, noise).predictions
    bundled = CodedPolicy("", *load_backend(str(path)))
    for source in (noise, tmp_path / "seen"):
        report = examine_codes(bundled, open_source(source), 2000)
        assert report.demonstrations is None
        assert report.predictions is not None
        np.testing.assert_allclose(
            report.predictions.pair_shares, checkpoint.pair_shares, atol=1e-4
        )
        for ours, theirs in zip(report.predictions.episodes, checkpoint.episodes, strict=True):
            np.testing.assert_allclose(ours.pair_entropy, theirs.pair_entropy, atol=1e-3)
            np.testing.assert_allclose(ours.mode_entropy, theirs.mode_entropy, atol=1e-3)
            assert (ours.modes == theirs.modes).all()
        assert report.predictions.tolerance == pytest.approx(checkpoint.tolerance, rel=1e-3)
    pairs = np.array([[0, 0], [7, 3], [2, 5]])
    bundle = Bundle.open(path)
    rest = {name: array for name, array in bundle.arrays.items() if name != DECODE_TABLE}
    bundle = replace(bundle, arrays=rest)
    untabulated = CodedPolicy("", bundle, create_backend("onnxruntime", bundle))
    np.testing.assert_allclose(untabulated.decode(pairs), bundled.decode(pairs), atol=1e-5)


def test_joint_probabilities_of_a_draw_that_is_impossible() -> None:
    """A secondary code that underflows stays impossible, whatever the primary one."""
    columns = np.array([[0, 0], [3, 0]], np.float32)
    both = joint(0, np.array([[0.5, 0.5], [0.0, 1.0]]), columns, 0.1)
    assert both.tolist() == [[0, 0.5], [0, 0.5]]


@pytest.mark.parametrize("frames", [1, 5, 30, 67, 5000])
def test_whole_episodes_are_chosen_within_the_frames(frames: int) -> None:
    places = chosen_places(codes.LENGTHS, frames)
    assert 0 < sum(p.stop - p.start for p in places) <= frames
    assert all(p.start == 0 for p in places)
    assert sum(p.stop < codes.LENGTHS[p.episode] for p in places) <= 1
    assert len({p.episode for p in places}) == len(places)
    assert {p.episode for p in chosen_places(codes.LENGTHS, frames, [2])} == {2}


def test_the_codebook_alone(trained: Path, tmp_path: Path) -> None:
    figures, _ = codes.report(trained, None, tmp_path / "codes.html")
    assert figures["demonstrations"] is figures["predictions"] is figures["data"] is None
    assert len(figures["pairs"]) == 64
    counts = load_file(trained / WEIGHTS)[BOOK.format(0).replace("embed", "cluster_size")][0]
    assert figures["training_use"][0]["counts"] == pytest.approx(counts.tolist(), rel=1e-5)


def test_data_of_another_robot_is_refused(noise: Path, tmp_path: Path) -> None:
    wide = codes.write_random(tmp_path / "wide", (8,), action_dim=3)
    with pytest.raises(DatasetError, match="'action' of shape"):
        codes.figures(miniature.checkpoint(), wide)
    other = miniature.checkpoint(size=(32, 32))
    with pytest.raises(DatasetError, match=r"observation\.image"):
        codes.figures(other, noise)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 4, "does not exist"),
        (["nowhere", "-o", "codes.pdf"], 2, "NAME.html"),
        (["nowhere", "--frames", "0"], 2, "--frames"),
        (None, 0, "notice: "),
    ],
)
@pytest.mark.usefixtures("cwd")
def test_the_command(
    trained: Path,
    data: Path,
    arguments: list[str] | None,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is refused, and that it prints what is wrong."""
    given = arguments or [str(trained), "--recording", str(data)]
    monkeypatch.setattr(sys, "argv", ["vqbet-codes", *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert (stopped.value.code or 0) == code
    printed = capsys.readouterr()
    assert words in printed.out + printed.err
    assert printed.out.endswith("codes.html\n") == Path("codes.json").is_file() == (code == 0)

"""Checkpoints of Robot Utility Models and Contact-Anchored Policies, beside what their code does.

`data/README.md` says how the checkpoints and their golden actions were made.
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from vqbet_edge_ros.loading import load_policy
from vqbet_edge_ros.parameters import parse
from vqbet_engines.builder import Job, build_plan
from vqbet_export.config import ExportConfig
from vqbet_export.exporter import ExportResult, export
from vqbet_export.nyu_stages import bicubic_matrix
from vqbet_serve.metadata import PolicyMetadata
from workshop import once

from vqbet_edge import EdgePolicy, Guards
from vqbet_edge.errors import CheckpointError, ObservationError, UsageError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.recorded import Recording
from vqbet_edge.training.backend import load_backend
from vqbet_edge.training.codes.policies import CodedPolicy
from vqbet_edge.training.dataset.samples import Piece, Place, Sampler
from vqbet_edge.training.nyu import load_nyu_checkpoint

DATA = Path(__file__).parent / "data"
IMAGE, GOAL = "observation.image", "observation.goal"
Saved = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """An episode, and what their `step` did in it."""

    name: str
    observations: list[dict[str, np.ndarray]]
    arrays: dict[str, np.ndarray]

    @property
    def checkpoint(self) -> str:
        return str(DATA / f"{self.name}.pt")

    @property
    def piece(self) -> Piece:
        frames = np.stack([seen[IMAGE] for seen in self.observations])[:, None]
        none = np.zeros((len(frames), 0), np.float32)
        return Piece(frames, self.arrays.get("goals", none))


@pytest.fixture(params=["rum", "cap"])
def golden(request: pytest.FixtureRequest) -> Golden:
    arrays = load_file(DATA / f"{request.param}.safetensors")
    observations = [{IMAGE: grid.repeat(8, 0).repeat(8, 1)} for grid in arrays["grids"]]
    for seen, goal in zip(observations, arrays.get("goals", ()), strict=False):
        seen[GOAL] = goal
    return Golden(request.param, observations, arrays)


@pytest.fixture
def bundle(golden: Golden, shared: Path) -> Path:
    """Exported for both targets, once a session."""
    path = shared / f"{golden.name}.bundle"

    def make() -> ExportResult:
        return export(ExportConfig(golden.checkpoint, path, verify_steps=32, fps=4))

    return once(path, make)


def test_the_reference_is_their_network(golden: Golden) -> None:
    """In float64, so that only their own rounding is between both."""
    network = load_nyu_checkpoint(golden.checkpoint).network.double()
    images = torch.from_numpy(golden.piece.frames).permute(0, 1, 4, 2, 3).double() / 255
    goals = torch.from_numpy(golden.piece.states).double()
    encoded = network.encode_images(network.crop(images)[None])[0]
    rows = (torch.arange(len(encoded))[:, None] + torch.arange(-2, 1)).clamp(min=0)
    features = network.features(encoded[rows], goals[rows])[:, -1]
    head, logits = network.head, network.head.code_logits(features)
    codes, steps = logits.argmax(dim=-1), torch.arange(len(features))
    offsets = head.offsets(features)[steps[:, None], torch.arange(2), codes].sum(dim=1)
    actions = (head.vqvae_model.decode(codes) + offsets)[:, 0].numpy()
    wanted = golden.arrays
    assert (codes.numpy() == wanted["codes"]).all()
    for layer, name in enumerate(("primary_logits", "secondary_logits")):
        np.testing.assert_allclose(logits[:, layer].numpy(), wanted[name], rtol=0, atol=1e-4)
    assert (np.abs(actions - wanted["actions"]) < 1e-4 * wanted["actions"].std(axis=0)).all()


def test_the_matrix_is_torch_s_interpolation() -> None:
    """That of float32: the exact one is 1e-5 away, which encoders magnify."""
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(images, 224, mode="bicubic", antialias=False)
    matrix = bicubic_matrix().double()
    made = matrix @ images.double() @ matrix.T
    torch.testing.assert_close(made, wanted.double(), rtol=0, atol=2e-6)


def test_a_bundle_acts_as_their_step(golden: Golden, bundle: Path) -> None:
    """From the first frame on, with the window that fills, at their temperature."""
    spread = golden.arrays["actions"].std(axis=0)
    for prefetch in ("thread", "off"):
        with EdgePolicy.load(bundle, "onnxruntime", prefetch=prefetch, prove=True) as policy:
            for episode in range(2):
                policy.reset(seed=episode)
                actions = []
                for seen, codes in zip(golden.observations, golden.arrays["codes"], strict=True):
                    actions.append(policy.act(seen))
                    assert policy.last is not None
                    assert (policy.last.codes == codes).all()
                errors = np.abs(np.stack(actions) - golden.arrays["actions"])
                assert (errors < 1e-3 * spread).all()


def test_the_bundle_says_what_it_is(golden: Golden, bundle: Path) -> None:
    with EdgePolicy.load(bundle, "onnxruntime") as policy:
        manifest = policy.manifest
        kinds = manifest.policy.action_kinds
        assert policy.action_limits is None
    assert kinds == (*("displacement",) * 3, *("rotation_vector",) * 3, "gripper")
    assert manifest.policy.bet_softmax_temperature == 1e-6
    expected = {IMAGE: (256, 256, 3)} | ({GOAL: (3,)} if golden.name == "cap" else {})
    assert manifest.observation_shapes == expected
    assert PolicyMetadata.of(manifest).observation.keys() == expected.keys()
    report = (bundle / "report.md").read_text()
    assert "its training says 2.0" in report
    assert "none are clamped" in report
    writer = {"rum": "Robot Utility Models", "cap": "Contact-Anchored Policies"}
    assert writer[golden.name] in report


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({GOAL: None}, "'observation.goal' is None, expected an array"),
        ({GOAL: np.array([0, np.nan, 0], np.float32)}, "'observation.goal': expected finite"),
        ({GOAL: np.zeros(2, np.float32)}, r"'observation.goal': expected float32 \(3,\)"),
        ({IMAGE: np.zeros((224, 224, 3), np.uint8)}, "trained on 256x256 .* resizes nothing"),
    ],
)
def test_what_it_cannot_observe_is_refused(
    golden: Golden, bundle: Path, changed: dict[str, Any], message: str
) -> None:
    seen = golden.observations[0]
    if not changed.keys() <= seen.keys():
        pytest.skip("it has no goal")
    with EdgePolicy.load(bundle, "onnxruntime", guards=Guards(action_limits=None)) as policy:
        first = policy.act(seen)
        with pytest.raises(ObservationError, match=message):
            policy.act(seen | changed)
        without = {key: value for key, value in seen.items() if key not in changed}
        with pytest.raises(ObservationError, match="is missing"):
            policy.act(without)
        policy.reset(seed=0)
        assert (policy.act(seen) == first).all()


def test_a_recording_is_decided_again_and_is_data(
    golden: Golden, bundle: Path, tmp_path: Path
) -> None:
    with EdgePolicy.load(bundle, "onnxruntime") as policy:
        with policy.record(tmp_path / "seen", decisions=True):
            actions = [policy.act(seen) for seen in golden.observations]
        (episode,) = Recording(tmp_path / "seen").episodes
        np.testing.assert_array_equal(episode.actions, actions)
        for row, seen in enumerate(golden.observations):
            found = episode.observation(row)
            assert all((found[key] == value).all() for key, value in seen.items())
        piece = Sampler.open(tmp_path / "seen", policy.manifest).read(Place(0, 0, 12, 0))
    np.testing.assert_array_equal(piece.frames, golden.piece.frames)
    np.testing.assert_array_equal(piece.states, golden.piece.states)


def test_the_report_on_codes_is_for_others(bundle: Path) -> None:
    opened, backend = load_backend(str(bundle), "onnxruntime")
    with pytest.raises(UsageError, match="the report on codes is for LeRobot's policies"):
        CodedPolicy("x", opened, backend)
    backend.close()


def test_the_ros_node_is_for_robots_with_a_state(bundle: Path) -> None:
    topics = {"cameras.topics": ["/camera"], "state.joints": ["a"], "command.topic": "/command"}
    parameters = parse({"bundle": str(bundle), "backend": "onnxruntime", "prove": False} | topics)
    with pytest.raises(UsageError, match=r"no state of joints.*EdgePolicy\.act"):
        load_policy(parameters)


def drop(*names: str) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        for name in names:
            del saved[name]

    return change


def setting(*path: str, value: object) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        part = saved["cfg"]
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value

    return change


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., None]:
    def change(saved: Saved) -> None:
        found = make(saved["loss_fn"].pop(name))
        if found is not None:
            saved["loss_fn"][name] = found

    return change


def added(name: str) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        saved["loss_fn"][name] = torch.zeros(2, 2)

    return change


MASK = "_vqbet._gpt_model.transformer.h.0.attn.bias"
HEADS = ("loss_fn", "gpt_model", "config", "n_head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("cfg"), r"holds \['epoch', 'loss_fn', 'model'.*expected \['cfg', 'loss_fn', 'model'\]"),
        (setting("loss_fn", value={}), "its cfg has None for loss_fn.obs_window_size"),
        (setting(*HEADS, value="six"), "its cfg has 'six' for loss_fn.gpt_model.config.n_head"),
        (setting(*HEADS, value=5), "5 heads of 12 together"),
        (setting("loss_fn", "obs_window_size", value=51), "a window of 51 and positions for 50"),
        (setting("loss_fn", "action_sequence_length", value=5), "chunks of 5 actions"),
        (setting("loss_fn", "xyz_only", value=True), "a policy with xyz_only"),
        (setting("model", "model_name", value="resnet50d"), "names the encoder 'resnet50d'"),
        (setting("goal_dim", value=0), "names the encoder 'hf-hub:notmahi/dobb-e', expected one of"),
        (added("_depth_net.conv.weight"), "a VQ-BeT that observes depth"),
        (added("_vqbet._map_to_cbet_preds_bin.0.weight"), "selects its codes jointly"),
        (added("_vqbet.more"), "is another policy than its sizes say.*_vqbet.more"),
        (tensor("_obs_adapter.weight", lambda _: None), "has nothing for '_obs_adapter.weight'"),
        (tensor("_obs_adapter.weight", lambda x: x * np.nan), "'_obs_adapter.weight' is not finite"),
        (tensor("_obs_adapter.weight", lambda x: x[:, :-1]), "another policy than its sizes say"),
        (tensor(MASK, torch.ones_like), "is no causal mask"),
        (lambda saved: saved.update(loss_fn=[1]), "expected a dictionary of tensors in its 'loss_fn'"),
    ],
)  # fmt: skip
def test_other_policies_are_refused_in_a_sentence(
    tmp_path: Path, change: Callable[[Saved], None], message: str
) -> None:
    saved = torch.load(DATA / "rum.pt", weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_nyu_checkpoint(str(tmp_path / "x.pt"))


def test_their_diffusion_policy_and_their_codebook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a diffusion policy"):
        load_nyu_checkpoint(str(DATA / "rum_diffusion.pt"))
    saved = torch.load(DATA / "rum.pt", weights_only=True)
    saved["loss_fn"] = {k: v for k, v in saved["loss_fn"].items() if k.startswith("_rvq.")}
    torch.save(saved, tmp_path / "rvq.pt")
    with pytest.raises(CheckpointError, match="a codebook alone, as train_rvq saves it"):
        load_nyu_checkpoint(str(tmp_path / "rvq.pt"))


class Poison:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_but_tensors_is_loaded(tmp_path: Path) -> None:
    saved = torch.load(DATA / "rum.pt", weights_only=True)
    torch.save(saved | {"optimizer1": Poison(tmp_path / "made")}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"cfg": Poison(tmp_path / "made")}))
    with pytest.raises(CheckpointError, match=r"wants to load 'posix\.mkdir'"):
        load_nyu_checkpoint(str(tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match=r"wants to load|cannot be read"):
        load_nyu_checkpoint(str(tmp_path / "b.pt"))
    assert not (tmp_path / "made").exists()


def test_what_is_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    whole = (DATA / "rum.pt").read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"weights"}.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot be read as a file of"):
            load_nyu_checkpoint(str(path))
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds Tensor, expected"):
        load_nyu_checkpoint(str(tmp_path / "tensor.pt"))


@pytest.mark.extended
def test_tensorrt_takes_the_graphs(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    opened = Bundle.open(bundle)
    for stage in opened.manifest.stages:
        job = Job(flavour="tensorrt_rtx", compute_capability="sm86")
        assert len(build_plan(opened.graph(stage), job).plan) > 1000

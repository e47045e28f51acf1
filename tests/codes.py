"""Policies and data for the tests of the report on codes, small and untrained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import numpy as np

from vqbet_edge.training.backend import TorchBackend
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.codes.cli import CodesConfig, write_report
from vqbet_edge.training.codes.findings import Finding
from vqbet_edge.training.codes.policies import CodedPolicy
from vqbet_edge.training.codes.report import examine_codes
from vqbet_edge.training.config import Feature, FeatureType
from vqbet_edge.training.dataset.samples import open_source
from vqbet_edge.training.dataset.writer import write_dataset
from vqbet_edge.training.description import without_graphs
from vqbet_edge.training.network import VQBeT

LENGTHS = (7, 20, 40)


def write_random(root: Path, lengths: tuple[int, ...] = LENGTHS, action_dim: int = 2) -> Path:
    """Episodes of noise that fit the miniature, actions a random walk within its limits."""
    random = np.random.default_rng(7)
    episodes = []
    for length in lengths:
        walk = random.normal(0, 0.2, (length, action_dim)).cumsum(axis=0)
        middle, half = np.resize([0.0, 30.0], action_dim), np.resize([2.0, 20.0], action_dim)
        seen = [miniature.observation(random) for _ in range(length)]
        episodes.append(
            {key: np.stack([row[key] for row in seen]) for key in seen[0]}
            | {"action": (middle + half * np.tanh(walk)).astype(np.float32)}
        )
    write_dataset(root, episodes, fps=10, task="anything")
    return root


def attentive(**fields: Any) -> Checkpoint:
    """The miniature, its codes depending on the state and its chunks on the codes."""
    policy = miniature.checkpoint(**fields)
    for name, weight in policy.network.named_parameters():
        strong = any(part in name for part in ("state_projector", ".attn.", ".decoder."))
        if strong and name.endswith("weight"):
            weight.mul_(12)
    return policy


def arm(name: str) -> Checkpoint:
    """Seven joints, and more code pairs than are listed."""
    small = miniature.checkpoint()
    action = Feature(FeatureType.ACTION, (7,))
    config = replace(small.config, output_features={"action": action}, vqvae_n_embed=20)
    network = VQBeT(config).eval().requires_grad_(False)
    return replace(small, network=network, normalization={}, name=name)


def coded(policy: Checkpoint) -> CodedPolicy:
    return CodedPolicy(policy.name, without_graphs(policy), TorchBackend(policy))


def figures(policy: Checkpoint, data: Path | None, frames: int = 2000) -> Any:
    source = None if data is None else open_source(data)
    return examine_codes(coded(policy), source, frames)


def report(policy: Path, data: Path | None, page: Path) -> tuple[Any, dict[str, Finding]]:
    """The command's JSON, and its findings by name."""
    config = CodesConfig(str(policy), None if data is None else str(data), page)
    findings = write_report(config)
    found = json.loads(page.with_suffix(".json").read_text())
    assert [finding["name"] for finding in found["findings"]] == [f.name for f in findings]
    return found, {finding.name: finding for finding in findings}

"""Putting a bundle on the Hugging Face Hub, with a card that says what it is and how to run it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.hub import parse_id
from vqbet_edge.runtime.lerobot_files import CONFIG_NAME
from vqbet_edge.runtime.manifest import MANIFEST_NAME, Manifest

_TAGS = ["robotics", "lerobot", "vqbet_edge", "vq-bet", "onnx"]


def check_repository(name: str) -> None:
    """Whether a bundle could be put there, before anything takes long.

    Raises:
        UsageError: the name is no repository's, or huggingface_hub is not installed.
    """
    repository = parse_id(name)
    if repository is None or repository.revision is not None:
        raise UsageError(
            f"--push-to-hub takes a repository's id, user/name, not ending in .bundle; got '{name}'"
        )
    try:
        import huggingface_hub  # noqa: F401, PLC0415 - not needed otherwise
    except ImportError as error:
        raise UsageError("--push-to-hub needs: pip install huggingface_hub") from error


def push(path: Path, name: str, *, private: bool = False) -> str:
    """Upload a bundle and its card in one commit; the repository is created where it is missing.

    Args:
        path: the bundle.
        name: the repository's id.
        private: whether a repository that is created is private.

    Returns:
        The repository's address.

    Raises:
        BundleError: it is no bundle.
        VQBeTEdgeError: the Hub refuses, or is out of reach.
    """
    from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415

    bundle = Bundle.open(path)
    files = {name: path / name for name in (MANIFEST_NAME, *bundle.manifest.files)}
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    operations.append(CommitOperationAdd("README.md", model_card(bundle, name).encode()))
    api = HfApi(library_name="vqbet-edge")
    try:
        address: str = api.create_repo(name, private=private or None, exist_ok=True)
        api.create_commit(name, operations, commit_message="A bundle of vqbet-export")
    except Exception as error:  # the network's, the Hub's, the client's
        reason = " ".join(str(error).split())
        raise VQBeTEdgeError(
            f"cannot upload to '{name}': {reason}; the bundle is whole at '{path}': log in with "
            f"'hf auth login' and upload it with: hf upload {name} '{path}'"
        ) from error
    return str(address)


def model_card(bundle: Bundle, name: str) -> str:
    """README.md of the repository `name`: what the bundle is, how to run it, its verification."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415

    manifest, config = bundle.manifest, msgspec.json.decode(bundle.contents[CONFIG_NAME])
    source = manifest.source.name
    original = parse_id(source)
    data = ModelCardData(
        license=config["license"],
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=_TAGS,
        base_model=None if original is None or Path(source).exists() else original.name,
    )
    report = bundle.contents["report.md"].decode()
    text = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name.partition('/')[2]}",
        _what_it_is(manifest, config["license"]),
        _how_to_run(name, manifest),
        # Headings one level down: the card has one title.
        re.sub(r"^#", "##", report, flags=re.MULTILINE),
    ]
    return "\n\n".join(text)


def _what_it_is(manifest: Manifest, license_name: str | None) -> str:
    terms = f"Licence: {license_name}." if license_name else "The checkpoint names no licence."
    verified = manifest.verification
    if verified is not None and verified.cases == "dataset":
        terms += " It carries some frames that its cameras saw, as reference cases."
    return (
        "A VQ-BeT robot policy (Behavior Generation with Latent Actions, arXiv 2403.03181), "
        "compiled by vqbet_edge into ONNX graphs and verified against its checkpoint. It acts "
        f"without PyTorch, in {' and '.join(manifest.precisions)}.\n\n{terms}"
    )


def _how_to_run(name: str, manifest: Manifest) -> str:
    return "\n".join(
        [
            "## Run it",
            "",
            "With LeRobot; in a clone of vqbet_edge, because no package index has it:",
            "",
            "    pip install '.[cli,cpu]' ./integrations/lerobot",
            f"    lerobot-rollout --policy.path={name} --robot.type=...",
            "",
            "With Python, without PyTorch; likewise:",
            "",
            "    pip install '.[cpu]' huggingface_hub",
            "",
            "```python",
            "from vqbet_edge import EdgePolicy",
            "",
            f'policy = EdgePolicy.load("{name}")',
            'action = policy.act({"observation.state": ..., ...})',
            "```",
            "",
            "| feature | type | shape |",
            "|---|---|---|",
            *_features(manifest),
        ]
    )


def _features(manifest: Manifest) -> Iterator[str]:
    features: dict[str, Any] = {**manifest.input_features, **manifest.output_features}
    for key, feature in features.items():
        yield f"| `{key}` | {feature.type} | {tuple(feature.shape)} |"

"""Putting a bundle on the Hugging Face Hub, with a card that says what it is and how to run it."""

import re
from pathlib import Path

import msgspec

from vqbet_edge.errors import UsageError, VQBeTEdgeError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.hub import parse_id
from vqbet_edge.runtime.lerobot_files import CONFIG_NAME
from vqbet_edge.runtime.manifest import MANIFEST_NAME

_TAGS = ["robotics", "lerobot", "vqbet_edge", "vq-bet", "onnx"]
_CARD = """---
{data}
---

# {title}

A VQ-BeT robot policy (Behavior Generation with Latent Actions, arXiv 2403.03181), compiled by \
vqbet_edge into ONNX graphs and verified against its checkpoint. It acts without PyTorch, in \
{precisions}.

{terms}

## Run it

With LeRobot; in a clone of vqbet_edge, because no package index has it:

    pip install '.[cli,cpu]' ./integrations/lerobot
    lerobot-rollout --policy.path={name} --robot.type=...

With Python, without PyTorch; likewise:

    pip install '.[cpu]' huggingface_hub

```python
from vqbet_edge import EdgePolicy

policy = EdgePolicy.load("{name}")
action = policy.act({{"observation.state": ..., ...}})
```

| feature | type | shape |
|---|---|---|
{features}

{report}"""


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
    terms = "The checkpoint names no licence."
    if config["license"]:
        terms = f"Licence: {config['license']}."
    if manifest.verification is not None and manifest.verification.cases == "dataset":
        terms += " It carries some frames that its cameras saw, as reference cases."
    features = {**manifest.input_features, **manifest.output_features}
    return _CARD.format(
        data=data.to_yaml(),
        title=name.partition("/")[2],
        precisions=" and ".join(manifest.precisions),
        terms=terms,
        name=name,
        features="\n".join(f"| `{k}` | {f.type} | {tuple(f.shape)} |" for k, f in features.items()),
        # Headings one level down: the card has one title.
        report=re.sub(r"^#", "##", bundle.contents["report.md"].decode(), flags=re.MULTILINE),
    )

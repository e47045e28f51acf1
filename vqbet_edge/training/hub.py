"""Checkpoints and data sets from the Hugging Face Hub, when its client is installed."""

import re
from pathlib import Path

from vqbet_edge.errors import HubError, UsageError

_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether `source` can be the id of a repository, `user/name`."""
    return _ID.fullmatch(source) is not None


def download(repo_id: str, kind: str, patterns: list[str] | None = None) -> Path:
    """A repository's folder in the client's cache, downloaded if it is not there.

    Args:
        repo_id: `user/name`.
        kind: "model" or "dataset".
        patterns: of the files to take; None takes all.

    Raises:
        UsageError: the client is not installed.
        HubError: there is no such repository, no access to it, or no network.
    """
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional, and slow
    except ImportError as e:
        raise UsageError(
            f"'{repo_id}' does not exist here; to take it from the Hub: pip install huggingface_hub"
        ) from e
    try:
        return Path(snapshot_download(repo_id, repo_type=kind, allow_patterns=patterns))
    except Exception as e:  # the client raises many types, all of them mean the same here
        raise HubError(
            f"'{repo_id}' is no folder here, and the {kind} is not to be had from the Hub: {e}. "
            "Check the name, the network and, if it is private, type: hf auth login"
        ) from e


def remedy(path: Path) -> str:
    """What to do about a file that is not what its name says."""
    with path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    if pointer:
        return f"it is a Git LFS pointer, not the file; in {path.parent} type: git lfs pull"
    return "copy or download it again"

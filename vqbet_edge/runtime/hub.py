"""The Hugging Face Hub: checkpoints, data sets, and bundles, which are repositories of their files.

The Hub's client is imported only for what is not on this machine's disk; a robot does without.
"""

import os
import re
from pathlib import Path

from vqbet_edge.errors import BundleError, HubError, UsageError
from vqbet_edge.runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, decode_manifest

# A repository's id. What ends like a bundle is a directory, or a mistyped one.
_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(?<!\.bundle)")
_SNAPSHOTS, _BLOB = "snapshots", re.compile(r"\.\./\.\./blobs/[0-9a-f]{40,64}")


def is_hub_id(source: str) -> bool:
    """Whether this is spelled as the id of a repository."""
    return _ID.fullmatch(source) is not None


def local_bundle(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a bundle, downloaded if `source` is no path here but a repository's id.

    Only the files that the manifest names are downloaded, into the Hub client's cache; the client's
    own settings hold (`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`). They are not checked yet: that is
    for `Bundle.open`.

    Args:
        source: a directory, or a repository's id such as "user/pusht-edge".
        revision: of the repository: a branch, tag or commit; None is its main branch.

    Raises:
        UsageError: huggingface_hub is not installed, or a directory was given a revision.
        BundleError: the repository cannot be read, or is no bundle.
    """
    path, name = Path(source), str(source)
    if os.path.lexists(path) or not is_hub_id(name):
        if revision is not None:
            raise UsageError(
                f"a revision is for a repository on the Hub, and '{name}' is "
                f"{'a path here' if os.path.lexists(path) else 'not spelled user/name'}"
            )
        return path
    try:
        return _download_bundle(name, revision)
    except HubError as error:
        raise BundleError(str(error)) from error


def download(
    name: str,
    kind: str = "model",
    patterns: list[str] | None = None,
    revision: str | None = None,
    cache: Path | None = None,
) -> Path:
    """A repository's folder in the client's cache, downloaded if it is not there.

    Args:
        name: the repository's id.
        kind: "model" or "dataset".
        patterns: of the files to take; None takes all.
        revision: a branch, tag or commit; None is the main branch.
        cache: another one than the client's own.

    Raises:
        UsageError: the client is not installed.
        HubError: there is no such repository, no access to it, or no network.
    """
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - a robot does without
    except ImportError as error:
        raise UsageError(
            f"'{name}' does not exist here; to read it from the Hub: pip install huggingface_hub"
        ) from error
    try:
        found = snapshot_download(
            name, repo_type=kind, allow_patterns=patterns, revision=revision, cache_dir=cache
        )
    except Exception as error:  # the client raises many types, all of them mean the same here
        reason = " ".join(str(error).split())
        raise HubError(
            f"'{name}' does not exist here, and cannot be read from the Hub: {reason}. Check the "
            "name, the network and, if it is private, type: hf auth login"
        ) from error
    return Path(found)


def _download_bundle(name: str, revision: str | None) -> Path:
    snapshot = download(name, patterns=[MANIFEST_NAME], revision=revision)
    manifest = snapshot / MANIFEST_NAME
    if not manifest.is_file():
        raise BundleError(
            f"'{name}' on the Hub holds no {MANIFEST_NAME}, so it is no bundle; make one with: "
            f"vqbet-export {name}"
        )
    with manifest.open("rb") as file:
        files = decode_manifest(file.read(MAX_MANIFEST_BYTES + 1)).files
    # The snapshot's name is its commit, so that all files are of one.
    return download(name, patterns=[MANIFEST_NAME, *files], revision=snapshot.name)


def stored(path: Path) -> Path:
    """Where a bundle's file lies: itself, but for a link of the Hub's cache to its own store.

    The Hub's client keeps `snapshots/COMMIT/NAME` as a link to `../../blobs/DIGEST`; any other link
    is left to be refused.
    """
    if path.parent.parent.name != _SNAPSHOTS or not path.is_symlink():
        return path
    target = path.readlink()
    return path.parent / target if _BLOB.fullmatch(str(target)) else path

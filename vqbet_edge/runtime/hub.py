"""The Hugging Face Hub: checkpoints, data sets, and bundles, which are repositories of their files.

The Hub's client is imported only for what is not on this machine's disk; a robot does without.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from vqbet_edge.errors import BundleError, HubError, UsageError
from vqbet_edge.runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from vqbet_edge.runtime.manifest_reading import decode_manifest

# A repository's id, and after an @ a branch, tag or commit. What ends like a bundle is a directory,
# or a mistyped one.
_ID = re.compile(r"((?!\.)[\w.-]+/[\w.-]+(?<!\.bundle))(?:@([\w./-]+))?")
_SNAPSHOTS, _BLOB = "snapshots", re.compile(r"\.\./\.\./blobs/[0-9a-f]{40,64}")


class Repository(NamedTuple):
    """What "user/name@revision" says; without a revision it is the main branch."""

    name: str
    revision: str | None


def parse_id(source: str) -> Repository | None:
    """The repository that is meant, None where this is not spelled as one's id."""
    found = _ID.fullmatch(source)
    return None if found is None else Repository(*found.groups())


def is_hub_id(source: str) -> bool:
    """Whether this is spelled as the id of a repository: "user/name" or "user/name@revision"."""
    return parse_id(source) is not None


def is_bundle(source: str) -> bool:
    """Whether a policy, here or on the Hub, is a bundle; otherwise it should be a checkpoint.

    Raises:
        UsageError, HubError: as `download` does.
    """
    here = os.path.lexists(source) or not is_hub_id(source)
    folder = Path(source) if here else download(source, patterns=[MANIFEST_NAME])
    return (folder / MANIFEST_NAME).is_file()


def local_bundle(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a bundle, downloaded if `source` is no path here but a repository's id.

    Only the files that the manifest names are downloaded, into the Hub client's cache; the client's
    own settings hold (`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`). They are not checked yet: that is
    for `Bundle.open`.

    Args:
        source: a directory, or a repository's id such as "user/edge" or "user/edge@v2".
        revision: of the repository, if the id names none: a branch, tag or commit; None is the
            main branch.

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
        plain, patterns = name.partition("@")[0], [MANIFEST_NAME, *files]
        return download(plain, patterns=patterns, revision=snapshot.name)
    except HubError as error:
        raise BundleError(str(error)) from error


def pinned(source: str, folder: Path) -> str:
    """What names the same bundle on other machines and later: it was found in `folder`."""
    if os.path.lexists(source):
        return str(folder.resolve())
    return f"{source.partition('@')[0]}@{folder.name}"  # a snapshot's name is its commit


def download(
    source: str,
    kind: str = "model",
    patterns: list[str] | None = None,
    revision: str | None = None,
    cache: Path | None = None,
) -> Path:
    """A repository's folder in the client's cache, or another, downloaded if it is not there.

    Args:
        source: the repository's id.
        kind: "model" or "dataset".
        patterns: of the files to take; None takes all.
        revision: a branch, tag or commit; None is what the id names, or the main branch.
        cache: another one than the client's own.

    Raises:
        UsageError: the client is not installed, or there are two revisions.
        HubError: there is no such repository, no access to it, or no network.
    """
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - a robot does without
    except ImportError as error:
        raise UsageError(
            f"'{source}' does not exist here; to read it from the Hub: pip install huggingface_hub"
        ) from error
    name, named = parse_id(source) or Repository(source, None)
    if None not in {revision, named} and revision != named:
        raise UsageError(f"'{source}' names one revision and revision={revision!r} another")
    revision = revision or named
    try:
        found = snapshot_download(
            name, repo_type=kind, allow_patterns=patterns, revision=revision, cache_dir=cache
        )
    except Exception as error:  # the client raises many types, all of them mean the same here
        reason = " ".join(str(error).split())
        raise HubError(
            f"'{source}' does not exist here, and cannot be read from the Hub: {reason}. Check the "
            "name, the network and, if it is private, type: hf auth login"
        ) from error
    return Path(found)


def stored(path: Path) -> Path:
    """Where a bundle's file lies: itself, but for a link of the Hub's cache to its own store.

    The Hub's client keeps `snapshots/COMMIT/NAME` as a link to `../../blobs/DIGEST`; any other link
    is left to be refused.
    """
    if path.parent.parent.name != _SNAPSHOTS or not path.is_symlink():
        return path
    target = path.readlink()
    return path.parent / target if _BLOB.fullmatch(str(target)) else path

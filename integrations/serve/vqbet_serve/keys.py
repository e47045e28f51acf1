"""Who may drive robots: a file of names and keys, read again whenever it changes."""

import hmac
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from vqbet_edge.errors import UsageError

_LOG = logging.getLogger(__name__)
#: The robot of a server without keys, and of a key without a name.
UNNAMED = "unnamed"
_SHORTEST = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_BYTES = 1 << 20
# What changes with a file; None where it is not there.
_Stamp: TypeAlias = tuple[int, int, int] | None


class Keys:
    """The keys that clients may send.

    Args:
        text: a line per key, `KEY` or `NAME KEY`; a name may have several keys, so that a new one
            holds before the old one goes. Empty lines, and those that begin with #, say nothing.

    Raises:
        UsageError: a line is neither, or there is no key.
    """

    def __init__(self, text: str) -> None:
        self._robots = _parsed(text)
        self._path: Path | None = None
        self._seen: _Stamp = None

    def __repr__(self) -> str:
        """Without the keys."""
        return f"Keys of {sorted(set(self._robots.values()))}"

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Those in a file.

        Raises:
            UsageError: it is no text, or has something else in it.
        """
        seen = _stamp(path)  # before it is read: what changes meanwhile is seen later
        keys = cls(_text(path))
        keys._path, keys._seen = path, seen
        return keys

    def robot(self, given: Sequence[bytes]) -> str | None:
        """Whose key a client's `Authorization` headers hold, in constant time; None: nobody's."""
        self._look()
        if len(given) != 1:
            return None
        # Every key is compared, whichever fits.
        found = [robot for key, robot in self._robots.items() if hmac.compare_digest(given[0], key)]
        return found[0] if found else None

    def _look(self) -> None:
        """Take what the file says now; what cannot be read changes nothing."""
        if self._path is None or (stamp := _stamp(self._path)) == self._seen:
            return
        self._seen = stamp
        try:
            self._robots = _parsed(_text(self._path))
        except (OSError, UsageError) as error:
            _LOG.error("the keys from before still hold: %s", error)
        else:
            _LOG.info("read keys again: %s", self)


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES)
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not a file with keys in ASCII") from error


def _parsed(text: str) -> dict[bytes, str]:
    """Authorization header -> whose it is."""
    robots: dict[bytes, str] = {}
    for words in map(str.split, text.splitlines()):
        if not words or words[0].startswith("#"):
            continue
        robot, key = (UNNAMED, *words) if len(words) == 1 else (words[0], words[-1])
        if len(words) > 2 or len(key) < _SHORTEST or not all("!" <= each <= "~" for each in key):
            raise _refused(len(key))
        if not _NAME.fullmatch(robot):
            raise UsageError(
                f"expected a name of 1 to 64 letters, digits, . _ or -, got {robot[:80]!r}"
            )
        if robots.setdefault(f"Api-Key {key}".encode(), robot) != robot:
            raise UsageError(
                "expected keys of their own for robots with other names, got one twice"
            )
    if not robots:
        raise _refused(0)
    return robots


def _refused(length: int) -> UsageError:
    return UsageError(
        f"expected a key of {_SHORTEST} or more ASCII characters without spaces, alone on its line "
        f"or behind a robot's name, got {length}; make one with: "
        "python -c 'import secrets; print(secrets.token_hex())'"
    )

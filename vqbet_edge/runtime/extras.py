"""What to type where an optional package is missing."""

import re
import shlex
from importlib.metadata import PackageNotFoundError, requires

_NAME = "vqbet-edge"
# A requirement, its own condition if there is one, and the extra that it belongs to.
_LINE = re.compile(r"""([^;]+?)\s*(?:;\s*(?:\(?(.*?)\)? and )?extra == ["']([\w-]+)["'])?""")


def install_command(*extras: str) -> str:
    """The command that installs what some of our extras need.

    No package index has vqbet-edge, so it names the packages, as the metadata of what is installed
    here does: pip install 'rich>=13' 'tyro>=0.9'.
    """
    try:
        lines = requires(_NAME) or []
    except PackageNotFoundError:  # run from its sources
        return f"pip install '.[{','.join(extras)}]'  # in a clone of {_NAME}"
    found = [match.groups() for line in lines if (match := _LINE.fullmatch(line))]
    # pip decides about conditions; double quotes fit into a shell's.
    wanted = dict.fromkeys(
        name + (f"; {condition}".replace("'", '"') if condition else "")
        for name, condition, extra in found
        if extra in extras
    )
    return f"pip install {' '.join(map(shlex.quote, wanted))}"

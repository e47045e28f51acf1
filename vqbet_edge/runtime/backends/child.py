"""Starting Python programs of this package from where no file of a bundle is imported."""

import sys

# `python -m` and `python -c` put the current directory first, and a user may stand in a bundle
# that was downloaded. `-P` would do, but Python 3.10 has none.
_CODE = "import sys; sys.path[:1] = filter(None, sys.path[:1]); from {} import main; main()"


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that calls a module's `main()` without importing from the current directory.

    PYTHONPATH counts as ever.
    """
    return [sys.executable, "-c", _CODE.format(module), *arguments]

"""The doctor's last question: does what is here compute a bundle's policy?"""

from collections.abc import Iterator
from typing import get_args

from vqbet_edge.errors import BackendError, VerificationError
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.proof import Proof, prove
from vqbet_engines.findings import Finding, Fix

_BACKENDS: tuple[BackendName, ...] = tuple(n for n in get_args(BackendName) if n != "auto")
_DOCS = "docs/engines.md"


def prove_backends(bundle: Bundle) -> Iterator[Finding]:
    """Act the bundle's reference cases out on every backend that is here, one after the other.

    Nothing is built, and every backend is closed before the next is loaded: a small board has no
    memory for two.

    Raises:
        BundleError: it has no reference cases.
    """
    for name in _BACKENDS:
        yield _finding(name, bundle)


def _finding(name: BackendName, bundle: Bundle) -> Finding:
    what, build = f"proof on {name}", f"vqbet-build '{bundle.path}'"
    try:
        figures = _prove(name, bundle).table()
    except VerificationError as error:
        fix = Fix(f"{build} --force", _DOCS) if name == "tensorrt" else None
        return Finding(what, "problem", str(error), fix)
    except BackendError as error:
        fix = Fix(build, _DOCS) if build in str(error) else None
        return Finding(what, "note", f"not there: {error}", fix)
    return Finding(what, "ok", "\n".join(f"{row}: {text}" for row, text in figures))


def _prove(name: BackendName, bundle: Bundle) -> Proof:
    backend = create_backend(name, bundle, build=False)
    try:
        return prove(bundle, backend)
    finally:
        backend.close()

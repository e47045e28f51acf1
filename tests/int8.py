"""What tests of INT8 share."""

from pathlib import Path

import oracle
from vqbet_calibration.samples import Samples, load_samples

from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.normalization import Affine

PUSHT = Path(__file__).parent / "data" / "pusht"
# An untrained policy with PushT's features.
CASE = oracle.small("pusht")


def samples_for(bundle: Bundle, source: Path, steps: int = 64) -> Samples:
    scaling = Affine.from_arrays(bundle.arrays, "state", bundle.manifest.state_dim)
    return load_samples(str(source), bundle.manifest, scaling, steps)

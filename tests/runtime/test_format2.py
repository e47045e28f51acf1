"""Bundles that were made before format 3 act as they did: the stored one was made then."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from miniature import HIGH, IMAGE, LOW, STATE
from safetensors.numpy import load_file

from vqbet_edge import BundleError, EdgePolicy, Guards
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import ACTION_RANGE, MANIFEST_NAME, STATE_RANGE
from vqbet_edge.runtime.manifest_reading import decode_manifest

STORED = Path(__file__).parent.parent / "data" / "format2"


def test_it_acts_as_when_it_was_made() -> None:
    """Codes are drawn one knowing the other, from logits that lack the primary one's part."""
    seen = load_file(STORED / "acted.safetensors")
    free = Guards(action_limits=None)
    with EdgePolicy.load(STORED / "bundle", "onnxruntime", seed=7, guards=free) as policy:
        acted = [
            policy.act({IMAGE: image, STATE: state})
            for image, state in zip(seen["images"], seen["states"], strict=True)
        ]
    np.testing.assert_allclose(acted, seen["actions"], rtol=1e-4, atol=1e-4)


def test_what_it_does_not_say_is_unknown_or_inferred() -> None:
    bundle = Bundle.open(STORED / "bundle")
    manifest = bundle.manifest
    assert (manifest.format_version, manifest.fps, manifest.license) == (2, None, None)
    assert (manifest.secondary_rows, manifest.policy.tokens_per_step) == (1, 3)
    for name in (STATE_RANGE, ACTION_RANGE):
        found = bundle.demonstrated(name, 2)
        np.testing.assert_allclose(found, [LOW, HIGH], rtol=1e-6)


@pytest.mark.parametrize("change", [(b"0.5", b"0.6"), (b"fp32", b"fp16"), (b"\n  ", b"\n   ")])
def test_its_text_is_checked_as_todays_is(change: tuple[bytes, bytes]) -> None:
    data = (STORED / "bundle" / MANIFEST_NAME).read_bytes()
    assert decode_manifest(data).format_version == 2
    with pytest.raises(BundleError, match=r"damaged or edited|is not a manifest"):
        decode_manifest(data.replace(*change) if change[0] in data else data + b" ")
    fields = msgspec.json.decode(data) | {"fps": 10}
    with pytest.raises(BundleError, match=r"damaged or edited|is not a manifest"):
        decode_manifest(msgspec.json.encode(fields))

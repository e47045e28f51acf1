"""What makes a bundle a LeRobot policy directory: a configuration and two processors.

The plugin in integrations/lerobot reads them. Fields that LeRobot 0.4.4 does not know would be an
error there, so only common ones are written; options of the runtime have the plugin's defaults.
"""

from typing import Any

import msgspec

from vqbet_edge.runtime.manifest import FeatureSpec, Manifest

CONFIG_NAME = "config.json"
POLICY_TYPE = "vqbet_edge"
_CPU = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


def lerobot_files(manifest: Manifest, license: str | None) -> dict[str, bytes]:  # noqa: A002
    """File name -> JSON.

    The processors batch and never normalise: the bundle does, and once is enough.

    Args:
        manifest: of the bundle.
        license: of the checkpoint.
    """
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
    batch: dict[str, Any] = {"registry_name": "to_batch_processor", "config": {}}
    files = {
        CONFIG_NAME: {
            "type": POLICY_TYPE,
            "n_obs_steps": manifest.policy.n_obs_steps,
            "input_features": _features(manifest.input_features),
            "output_features": _features(manifest.output_features),
            "device": "cpu",
            "license": license,
        },
        "policy_preprocessor.json": {
            "name": "policy_preprocessor",
            "steps": [rename, batch, _CPU],
        },
        "policy_postprocessor.json": {"name": "policy_postprocessor", "steps": [_CPU]},
    }
    return {
        name: msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
        for name, content in files.items()
    }


def _features(features: dict[str, FeatureSpec]) -> dict[str, Any]:
    return {
        key: {"type": feature.type, "shape": list(feature.shape)}
        for key, feature in features.items()
    }

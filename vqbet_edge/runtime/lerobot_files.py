"""What makes a bundle a LeRobot policy directory: a configuration and two processors.

LeRobot's loader imports and calls whatever class a processor's file names, and its configuration
may switch guards off. So nobody reads these files for what they say: they are made again from the
manifest, and must be the same bytes.

Fields that LeRobot 0.4.4 does not know would be an error there, so only common ones are written;
options of the runtime have the plugin's defaults.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from vqbet_edge.errors import BundleError
from vqbet_edge.runtime.manifest import Manifest, Text

CONFIG_NAME = "config.json"
LEROBOT_NAMES = (CONFIG_NAME, "policy_preprocessor.json", "policy_postprocessor.json")
POLICY_TYPE: Literal["vqbet_edge"] = "vqbet_edge"
_FOREIGN = (
    "{} is not what its manifest makes it, and LeRobot may run what it names: get the bundle from "
    "who exported it, or export again"
)
_CPU = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


class _Config(Struct, forbid_unknown_fields=True):
    """The fields of a bundle's `config.json`."""

    type: Literal["vqbet_edge"]
    n_obs_steps: int
    input_features: dict[str, Any]
    output_features: dict[str, Any]
    device: Literal["cpu"]
    license: Text | None


def lerobot_files(manifest: Manifest, license: str | None) -> dict[str, bytes]:  # noqa: A002
    """File name -> JSON.

    The processors batch and never normalise: the bundle does, and once is enough.

    Args:
        manifest: of the bundle.
        license: of the checkpoint.
    """
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
    batch: dict[str, Any] = {"registry_name": "to_batch_processor", "config": {}}
    contents = (
        {
            "type": POLICY_TYPE,
            "n_obs_steps": manifest.policy.n_obs_steps,
            "input_features": manifest.input_features,
            "output_features": manifest.output_features,
            "device": "cpu",
            "license": license,
        },
        {"name": "policy_preprocessor", "steps": [rename, batch, _CPU]},
        {"name": "policy_postprocessor", "steps": [_CPU]},
    )
    return {
        name: msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
        for name, content in zip(LEROBOT_NAMES, contents, strict=True)
    }


def check_lerobot_files(manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Compare those of a bundle with what its manifest makes them.

    Raises:
        BundleError: one differs.
    """
    terms = manifest.license
    if manifest.format_version == 2 and CONFIG_NAME in contents:
        terms = read_license(contents[CONFIG_NAME])
    for name, expected in lerobot_files(manifest, terms).items():
        if contents.get(name, expected) != expected:
            raise BundleError(_FOREIGN.format(name))


def read_license(config: bytes) -> str | None:
    """The licence in a bundle's `config.json`.

    Raises:
        BundleError: it has other fields than a bundle's.
    """
    try:
        return msgspec.json.decode(config, type=_Config).license
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(_FOREIGN.format(CONFIG_NAME)) from error

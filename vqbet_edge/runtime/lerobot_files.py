"""What makes a bundle a LeRobot policy directory: a configuration and two processors.

LeRobot's loader imports and calls whatever class a processor's file names, and its configuration
may switch guards off. So nobody reads these files for what they say: they are made again from the
manifest, and must be the same bytes.

Fields that LeRobot 0.4.4 does not know would be an error there, so only common ones are written;
options of the runtime have the plugin's defaults.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from vqbet_edge.errors import BundleError
from vqbet_edge.runtime.manifest import Manifest, Text

CONFIG_NAME = "config.json"
LEROBOT_NAMES = (CONFIG_NAME, "policy_preprocessor.json", "policy_postprocessor.json")
POLICY_TYPE: Literal["vqbet_edge"] = "vqbet_edge"
Step = dict[str, Any]
# Steps of a processor that leave one observation's numbers as they are.
RENAME: Step = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
BATCH: Step = {"registry_name": "to_batch_processor", "config": {}}
CPU: Step = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


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
    contents = (
        {
            "type": POLICY_TYPE,
            "n_obs_steps": manifest.policy.n_obs_steps,
            "input_features": features_json(manifest.input_features),
            "output_features": features_json(manifest.output_features),
            "device": "cpu",
            "license": license,
        },
        processor_json("policy_preprocessor", [RENAME, BATCH, CPU]),
        processor_json("policy_postprocessor", [CPU]),
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
    found = {name: contents[name] for name in LEROBOT_NAMES if name in contents}
    terms = manifest.license
    if manifest.format_version == 2 and CONFIG_NAME in found:
        terms = read_license(found[CONFIG_NAME])
    expected = lerobot_files(manifest, terms)
    for name, data in found.items():
        if data != expected[name]:
            raise _foreign(name)


def read_license(config: bytes) -> str | None:
    """The licence in a bundle's `config.json`.

    Raises:
        BundleError: it has other fields than a bundle's.
    """
    try:
        return msgspec.json.decode(config, type=_Config).license
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _foreign(CONFIG_NAME) from error


def _foreign(name: str) -> BundleError:
    return BundleError(
        f"{name} is not what its manifest makes it, and LeRobot may run what it names: get the "
        "bundle from who exported it, or export again"
    )


def processor_json(name: str, steps: Sequence[Step]) -> dict[str, Any]:
    """A processor's file."""
    return {"name": name, "steps": steps}


def features_json(features: Mapping[str, Any]) -> dict[str, Any]:
    """Features, which have a type and a shape, as LeRobot's configurations name them."""
    return {key: {"type": f.type, "shape": list(f.shape)} for key, f in features.items()}

"""Every field of a configuration, as people pass it from Python."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqbet_edge.errors import CheckpointError, UsageError
from vqbet_edge.training.config import (
    Feature,
    FeatureType,
    NormalizationMode,
    TrainConfig,
    VQBeTConfig,
    flag,
)

NEEDED: dict[str, Any] = {"dataset": "data", "output": "run"}
POLICY: dict[str, Any] = {
    "input_features": {
        "observation.image": {"type": "VISUAL", "shape": [3, 96, 96]},
        "observation.state": {"type": "STATE", "shape": [2]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
}
TRAIN = TrainConfig(**NEEDED, cameras=["front"], frame_cache="frames", resize_shape=[90, 90])
ALL_TRAIN = [field.name for field in fields(TrainConfig)]
# What no field takes.
WRONG: list[Any] = [object(), "a word", b"bytes", 1j, float("nan"), -3, [["a"]], {"a": object()}]


def test_texts_and_lists_and_numpys_numbers_are_taken() -> None:
    modes = {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "QUANTILES"}
    config = TrainConfig(
        dataset=Path("data"),  # type: ignore[arg-type]
        output="run",  # type: ignore[arg-type]
        normalization_mapping=modes,  # type: ignore[arg-type]
        crop_shape=np.array([48, 56]),  # type: ignore[arg-type]
        steps=np.int64(30_000),  # type: ignore[arg-type]
        optimizer_lr=np.float32(0.5),  # type: ignore[arg-type]
        optimizer_betas=[0, 0.5],  # type: ignore[arg-type]
        use_group_norm=np.True_,  # type: ignore[arg-type]
    )
    assert config == TrainConfig(
        dataset="data",
        output=Path("run"),
        normalization_mapping={key: NormalizationMode(mode) for key, mode in modes.items()},
        crop_shape=(48, 56),
        steps=30_000,
        optimizer_lr=0.5,
        optimizer_betas=(0.0, 0.5),
    )
    assert [type(each) for each in (config.steps, config.optimizer_lr)] == [int, float]
    assert VQBeTConfig(**POLICY).input_features["observation.state"] == Feature(
        FeatureType.STATE, (2,)
    )


@pytest.mark.parametrize("name", ALL_TRAIN)
def test_what_json_makes_of_a_field_is_taken(name: str) -> None:
    again = TrainConfig(**{**NEEDED, name: TRAIN.to_json()[name]})
    assert getattr(again, name) == getattr(TRAIN, name)


def refusal(kind: type[TrainConfig] | type[VQBeTConfig], name: str, value: object) -> str | None:
    """What is said about a value; None if it is taken."""
    base = NEEDED if kind is TrainConfig else POLICY
    try:
        kind(**{**base, name: value})
    except (UsageError, CheckpointError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", [TrainConfig, VQBeTConfig])
def test_what_a_field_does_not_take_is_refused_by_its_name(
    kind: type[TrainConfig] | type[VQBeTConfig],
) -> None:
    for name in [field.name for field in fields(kind)]:
        said = [text for value in WRONG if (text := refusal(kind, name, value))]
        assert len(said) >= 6, name  # a path or an id is any text
        for text in said:
            assert name in text or flag(name) in text, text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization_mapping": {"STATE": "MIN_MAX"}}, "needs a mode each for ACTION, STATE, V"),
        ({"normalization_mapping": {"STATE": "MINMAX"}}, r"normalization_mapping .*: Invalid enum"),
        ({"ema_decay": 1.0}, r"ema_decay \(--ema-decay\): Expected `float` < 1.0; got 1.0"),
        ({"optimizer_betas": (0.9, 1.5)}, r"--optimizer-betas\): Expected `float` < 1.0"),
        ({"optimizer_lr": float("inf")}, r"--optimizer-lr\): Expected a finite number; got inf"),
        ({"bet_softmax_temperature": 0}, "Expected `float` > 0.0; got 0"),
        ({"seed": -1}, "--seed.*: Expected `int` >= 0; got -1"),
        ({"batch_size": 0}, "--batch-size.*: Expected `int` >= 1; got 0"),
        ({"cameras": "front"}, r"cameras \(--cameras\): Expected .*, got `str`"),
        ({"steps": 30_000.5}, "steps .*Expected `int`, got `float`"),
    ],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**{**NEEDED, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"input_features": {"observation.image": POLICY["input_features"]["observation.image"]}},
        {"input_features": {**POLICY["input_features"], "goal": {"type": "STATE", "shape": [2]}}},
        {"output_features": {"next": {"type": "ACTION", "shape": [2]}}},
    ],
)
def test_a_policy_has_one_state_and_one_action(changes: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected the one state .* and the one output feature"
    ):
        VQBeTConfig(**(POLICY | changes))

"""LeRobot data sets as NumPy arrays: training, calibration and verification read them here."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqbet_edge.training.dataset.dataset import LeRobotDataset, Split
    from vqbet_edge.training.dataset.metadata import DatasetFeature, DatasetInfo

__all__ = ["DatasetFeature", "DatasetInfo", "LeRobotDataset", "Split"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # When asked for: `samples` reads recordings where pyarrow and PyAV are not installed.
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from vqbet_edge.training.dataset import dataset, metadata  # noqa: PLC0415

    return getattr(dataset if hasattr(dataset, name) else metadata, name)

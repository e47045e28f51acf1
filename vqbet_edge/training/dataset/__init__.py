"""LeRobot data sets as NumPy arrays: training, calibration and verification read them here."""

from vqbet_edge.training.dataset.dataset import LeRobotDataset, Split
from vqbet_edge.training.dataset.metadata import DatasetFeature, DatasetInfo

__all__ = ["DatasetFeature", "DatasetInfo", "LeRobotDataset", "Split"]

"""Data sets: examples with labels or targets, read, checked and split."""

from ntkit.data.columns import Columns as Columns
from ntkit.data.dataset import Data as Data
from ntkit.data.dataset import from_dataset as from_dataset
from ntkit.data.dataset import from_tensors as from_tensors
from ntkit.data.loading import load as load
from ntkit.data.targets import Targets as Targets

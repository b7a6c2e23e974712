"""What a training run leaves on disk: parameters at steps, batch indices, optimiser settings, losses. Replayable."""

from ntkit.base.tensors import tensor_hash as tensor_hash
from ntkit.trajectory.record import Recorder as Recorder
from ntkit.trajectory.record import record as record
from ntkit.trajectory.recorded_run import Trajectory as Trajectory
from ntkit.trajectory.recorded_run import load_weights as load_weights
from ntkit.trajectory.train import train as train

__all__ = ["Recorder", "Trajectory", "load_weights", "record", "tensor_hash", "train"]

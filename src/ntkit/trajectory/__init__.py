"""What a training run leaves on disk: parameters at steps, batch indices, optimiser settings, losses. Replayable."""

from ntkit.trajectory.record import Recorder as Recorder
from ntkit.trajectory.record import record as record
from ntkit.trajectory.tensors import tensor_hash as tensor_hash
from ntkit.trajectory.train import train as train
from ntkit.trajectory.trajectory import Trajectory as Trajectory
from ntkit.trajectory.trajectory import load_weights as load_weights

__all__ = ["Recorder", "Trajectory", "load_weights", "record", "tensor_hash", "train"]

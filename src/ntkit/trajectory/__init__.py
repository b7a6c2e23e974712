"""What a training run leaves on disk: parameters at steps, batch indices, optimiser settings, losses. Replayable."""

from ntkit.trajectory.train import train as train
from ntkit.trajectory.trajectory import Trajectory as Trajectory
from ntkit.trajectory.trajectory import load_weights as load_weights
from ntkit.trajectory.trajectory import tensor_hash as tensor_hash

__all__ = ["Trajectory", "load_weights", "tensor_hash", "train"]

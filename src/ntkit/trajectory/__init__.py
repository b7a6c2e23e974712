"""A training run on disk: parameters at steps, batch indices, optimizer settings and losses; it can be replayed."""

from ntkit.trajectory.checkpoint_files import load_weights as load_weights
from ntkit.trajectory.record import Recorder as Recorder
from ntkit.trajectory.record import record as record
from ntkit.trajectory.recorded_run import Trajectory as Trajectory
from ntkit.trajectory.train import train as train

"""The kernel of a network along a recorded run: numbers of each snapshot, and their series."""

from ntkit.tracking.losses import half_squared as half_squared
from ntkit.tracking.series import Tracked as Tracked
from ntkit.tracking.series import scalars as scalars
from ntkit.tracking.series import write_images as write_images
from ntkit.tracking.tracker import track as track

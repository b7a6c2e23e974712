"""A network's kernel along a recorded run: what is measured of each snapshot, and the whole series."""

from ntkit.tracking.losses import half_squared as half_squared
from ntkit.tracking.series import Tracked as Tracked
from ntkit.tracking.series import scalars as scalars
from ntkit.tracking.tracker import track as track

__all__ = ["Tracked", "half_squared", "scalars", "track"]

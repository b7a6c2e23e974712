"""A network's kernel along a recorded run: what is measured of each snapshot, and the whole series."""

from ntkit.tracking.along import track as track
from ntkit.tracking.losses import half_squared as half_squared
from ntkit.tracking.tracked import Tracked as Tracked
from ntkit.tracking.tracked import scalars as scalars

__all__ = ["Tracked", "half_squared", "scalars", "track"]

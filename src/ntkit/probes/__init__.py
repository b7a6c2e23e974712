"""Image transformations, and how alike a kernel finds an image and its transform: the after-kernel paper's measure."""

from ntkit.probes.similarity import Cosines as Cosines
from ntkit.probes.similarity import ImageCosines as ImageCosines
from ntkit.probes.similarity import Invariance as Invariance
from ntkit.probes.similarity import cosines as cosines
from ntkit.probes.similarity import invariance as invariance
from ntkit.probes.transforms import Transform as Transform
from ntkit.probes.transforms import rotate as rotate
from ntkit.probes.transforms import shift as shift
from ntkit.probes.transforms import shuffle_patches as shuffle_patches
from ntkit.probes.transforms import standard as standard
from ntkit.probes.transforms import swap_quadrants as swap_quadrants
from ntkit.probes.transforms import zoom as zoom

"""The infinite-width limit: a module's run on a tape, its layers read off it, their kernels carried forward."""

"""Other implementations of the tangent kernel, each run in a process (and environment) of its own."""

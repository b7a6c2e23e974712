"""The path kernel: a trained network as a sum over its training examples, exactly."""

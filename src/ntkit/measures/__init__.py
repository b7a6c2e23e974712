"""What is asked of a kernel: spectrum, eigenfunctions, novelty, convergence to the limit of infinite width."""

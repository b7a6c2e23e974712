"""Networks: built-in ones, their initialization, parametrization, width and first-order expansion."""

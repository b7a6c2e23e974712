"""The secant Jacobian: finite differences as a chain rule, one rule per operation."""

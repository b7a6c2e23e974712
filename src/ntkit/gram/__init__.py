"""Kernel matrices: checks, leading eigenpairs."""

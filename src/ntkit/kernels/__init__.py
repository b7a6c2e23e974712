"""Kernels: one noun, one interface (`Kernel`), one file per kernel."""

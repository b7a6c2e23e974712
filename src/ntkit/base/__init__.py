"""Shared by all: checks of input, files, tensors on disk, progress."""

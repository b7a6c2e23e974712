"""What every package uses: checks of input, files, tensors on disk, batches, progress."""

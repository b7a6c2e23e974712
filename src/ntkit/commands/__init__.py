"""One file per command: settings in, run folder out."""

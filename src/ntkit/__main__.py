"""The command line as ``python -m ntkit``."""

from ntkit.cli import main

if __name__ == "__main__":
    main()

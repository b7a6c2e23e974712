"""How long ``ntkit --help`` and ``import ntkit`` take, as whole processes."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import median_seconds, save, words


def main() -> None:
    rows = []
    for name, command in {
        "python -c pass": ["-c", "pass"],
        "import ntkit": ["-c", "import ntkit"], "ntkit --help": ["-m", "ntkit.cli", "--help"],
    }.items():  # fmt: skip
        seconds = median_seconds(
            lambda command=command: subprocess.run([sys.executable, *command], capture_output=True, check=True), 9
        )
        rows.append({"command": name, "seconds": seconds})
    save("start", rows)


if __name__ == "__main__":
    words(__doc__)
    main()

"""Run with the Python of a fresh environment in which only the wheel and what it needs are installed.

Checks, in an empty folder: the package comes from the wheel, no optional package is there, the blocks of the README run
in their order, and so does every command on small data. `make test-wheel` makes the environment and runs this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

import ntkit

ROOT = Path(__file__).resolve().parents[1]
NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""
POINTS = """
import numpy
from sklearn.datasets import load_digits

x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
numpy.savez("mine.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:300], y_test=y[200:300])
"""
COMMANDS = """
ntkit --version
ntkit --help
ntkit analyze --model mlp --data digits --train 200 --test 100 --epochs 3 --out run
ntkit analyze --model mlp --data digits --train 200 --test 100 --epochs 3 --seed 1 --out other
ntkit report run
ntkit track run
ntkit explain run --test 3
ntkit compare run other --out both
ntkit verify run
ntkit analyze --model net.py:make --data mine.npz --epochs 3 --out own
ntkit infinite --model net.py:make --data mine.npz
ntkit gram net.py:make mine.npz --out kernel
ntkit verify kernel
ntkit solve kernel --spectrum 5 --ridge 0.001 --svm
"""


def without_extras() -> None:
    """Refuse an environment in which more than the wheel's own requirements is installed."""
    assert "site-packages" in Path(ntkit.__file__).parts, f"not from the wheel: {ntkit.__file__}"
    needed = {re.split(r"[<>=!;\[ ]", line)[0] for line in requires("ntkit") or () if "extra ==" not in line}
    optional = {re.split(r"[<>=!;\[ ]", line)[0] for line in requires("ntkit") or () if "extra ==" in line}
    there = [name for name in sorted(optional - needed - {"ntkit"}) if find_spec(name.replace("-", "_"))]
    assert not there, f"optional packages are installed: {there}"


def readme() -> None:
    """Run all Python blocks of the README as one script."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 3, "the README has lost its blocks"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:ntkit", "-c", "\n".join(blocks)], check=True)


def commands() -> None:
    """Run every command; each must end with exit code 0 and leave its page."""
    Path("net.py").write_text(NETWORK, encoding="utf-8")
    subprocess.run([sys.executable, "-c", POINTS], check=True)
    program = str(Path(sys.executable).with_name("ntkit"))
    for line in COMMANDS.strip().splitlines():
        print(f"$ {line}", flush=True)
        done = subprocess.run([program, *line.split()[1:]], check=True, stderr=subprocess.PIPE, text=True)
        print(done.stderr)
        assert "warning" not in done.stderr.lower(), "a warning that nobody can act on"
    pages = ["run/report.html", "run/track/track.html", "run/explain/explain.html", "both/report.html"]
    missing = [page for page in [*pages, "own/report.html", "kernel/solved.json"] if not Path(page).is_file()]
    assert not missing, f"not written: {missing}"


if __name__ == "__main__":
    without_extras()
    print(f"ntkit {version('ntkit')}, Python {sys.version.split()[0]}, torch {version('torch')}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        readme()
        commands()
        os.chdir(ROOT)
    print("The wheel works.")

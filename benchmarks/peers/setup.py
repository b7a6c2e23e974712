"""Make the peers' environments: ``python -m benchmarks.peers.setup [jax | torch | attribution ...]``; else all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = {name: ROOT / f".venv-peers-{name}" for name in ("jax", "torch", "attribution")}

# One pip call each. neural-tangents 0.6.5 is archived: it needs a JAX of its time. Only its TensorFlow front end needs
# TensorFlow: so it and tf2jax come without their dependencies, and that front end is switched off below.
# explaind asks for Python 3.12 and much that its path kernel never imports; that needs neither (see explaind.py).
PACKAGES = {
    "jax": [
        ["jax==0.4.23", "jaxlib==0.4.23", "numpy<2", "scipy<1.13", "frozendict", "absl-py"],
        ["--no-deps", "neural-tangents==0.6.5", "tf2jax"],
    ],
    "torch": [
        ["torch==2.13.0", "nngeometry==0.4", "numpy", "tqdm"],
        ["--no-deps", "--ignore-requires-python", "explaind==0.0.2"],
    ],
    "attribution": [["torch==2.13.0", "dattri==0.3.0", "captum==0.9.0", "traker==0.3.2", "safetensors"]],
}  # fmt: skip


def interpreter(name: str) -> Path:
    """Python of an environment; the file is absent if the environment was not made."""
    return ENVIRONMENTS[name] / "bin" / "python"


def make(name: str) -> None:
    """Make one environment; safe to repeat."""
    python = interpreter(name)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENTS[name]], check=True)
    for packages in PACKAGES[name]:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    if name == "jax":
        _without_tensorflow(python)


def _without_tensorflow(python: Path) -> None:
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    file = Path(site) / "neural_tangents" / "__init__.py"
    lines = ["# " + line if line.strip() == "from . import experimental" else line for line in file.open()]
    if not any(line.startswith("# from . import experimental") for line in lines):
        raise SystemExit(f"{file} has no line 'from . import experimental': not the release this script knows")
    file.write_text("".join(lines))


if __name__ == "__main__":
    for wanted in sys.argv[1:] or list(ENVIRONMENTS):
        make(wanted)
        print(f"{wanted}: {interpreter(wanted)}")

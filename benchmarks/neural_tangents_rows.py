"""Every row of the page "Coming from neural-tangents", by both programs: ``python -m benchmarks.neural_tangents_rows``.

The lines of docs/how-to/neural-tangents.md are run as they stand there, in float64: of a layer both kernels ("ntk",
"nngp"). Of a closed form the largest difference over the largest value; of a sampled one the distance from
neural-tangents' values over the standard error, both as Frobenius norms. Entries that neural-tangents returns as NaN
are counted and left out. Needs neural-tangents' environment: ``python -m benchmarks.peers.setup jax``.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import save, words
from benchmarks.peers import stax_rows
from benchmarks.peers.job import ROOT
from benchmarks.peers.setup import interpreter
from benchmarks.peers.stax_rows import FUNCTIONS, KINDS, Row


def main() -> None:
    """All rows, and which of them differ."""
    python = interpreter("jax")
    if not python.exists():
        raise SystemExit("neural-tangents is not installed: python -m benchmarks.peers.setup jax")
    theirs = _their_values(python)
    found = []
    for row in stax_rows.rows():
        for kind in KINDS[:1] if row.section == FUNCTIONS else KINDS:
            found.append({"row": row.name, "verdict": row.verdict, "kind": kind, **_compared(row, kind, theirs)})
            print(found[-1], flush=True)
    far = {one["row"] for one in found if one.get("largest difference / largest value", 0) > 1e-10}
    save("neural_tangents_rows", found, rows_that_differ_by_more_than_1e_minus_10=sorted(far))


def _their_values(python: Path) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.npz"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [python, "-W", "ignore", "-m", "benchmarks.peers.stax_rows", file]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        with np.load(file) as values:
            return dict(values)


def _compared(row: Row, kind: str, theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    wanted = theirs[f"{row.name} {kind}"]
    if wanted.dtype.kind == "U":
        return {"neural-tangents": str(wanted)}
    if row.verdict == "sampled":
        mean, error = _sampled(row)
        away = float(np.linalg.norm(mean - wanted))
        return {
            "distance / standard error": away / float(np.linalg.norm(error)),
            "distance / values": away / float(np.linalg.norm(wanted)),
        }
    values, known = stax_rows.ours(row, kind), ~np.isnan(wanted)
    gap = np.abs(values - wanted)[known].max() / np.abs(wanted[known]).max()
    missing = {} if known.all() else {"NaN of neural-tangents": int((~known).sum())}
    return {"largest difference / largest value": float(gap), **missing}


def _sampled(row: Row) -> tuple[np.ndarray, np.ndarray]:
    found = eval(row.ours.removesuffix(".mean"), stax_rows.names_of_functions())
    return found.mean.numpy(), found.standard_error.numpy()


if __name__ == "__main__":
    words(__doc__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()

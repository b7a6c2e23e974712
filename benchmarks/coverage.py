"""Which model families are on the fast path, and how exact they are: writes docs/coverage.md.

``python -m benchmarks.coverage`` runs all; names of families as arguments run those and write nothing.
"""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import torch
from torch import Tensor

import ntkit
from benchmarks.families import FAMILIES, Family
from ntkit.jacobian.model_calls import select_parameters
from ntkit.jacobian.oracle import jacobian

ROOT = Path(__file__).resolve().parents[1]
BOUND = 1e-9  # on errors, relative to the largest entry
FAST = 0.95  # share of parameter entries from which a family counts as covered
FAMILIES_COVERED = 25
_FLOOR = 1e-6  # of the largest share: below it the bound would ask for more digits than float64 has
_CHUNK = 4_000_000  # parameter entries whose Jacobian the oracle holds at once


@dataclass
class Row:
    """What was found of one family; `failed` and `skipped` say why there are no numbers."""

    name: str
    parameters: int = 0
    share: float = 0.0
    fallback: dict[str, str] = field(default_factory=dict)
    error: float = float("inf")  # of the kernel, relative to its largest entry
    share_error: float = float("inf")  # worst of a parameter's share, relative to that share
    seconds: float = 0.0  # of the first call, self-check included
    oracle: float = 0.0
    refused: str = ""
    skipped: str = ""
    failed: str = ""

    def good(self) -> bool:
        """Whether nothing is wrong with it; what could not run here is not held against it."""
        if self.refused or self.skipped:
            return True
        return not self.failed and self.error <= BOUND and self.share_error <= BOUND  # false for NaN, too


def measure(family: Family, name: str = "") -> Row:
    """Compare a family's kernel of 3 x 2 samples with the oracle, as a whole and parameter by parameter.

    Raises
    ------
    Refused
        When ntkit gives no kernel for it.
    """
    model, x1, x2 = family.draw()
    kernel = ntkit.TangentKernel(model, outputs=family.outputs)
    start = time.perf_counter()
    K = kernel(x1, x2)
    seconds = time.perf_counter() - start
    shares = kernel.layers(x1, x2)
    fallback = kernel.fallback(x1) | kernel.fallback(x2)
    start = time.perf_counter()
    exact = reference_shares(model, x1, x2, family.outputs)
    oracle = time.perf_counter() - start
    assert shares.keys() == exact.keys()
    entries = {key: p.numel() for key, p in select_parameters(model, None).items()}
    whole = sum(exact.values(), torch.zeros_like(K))
    largest = max(float(e.abs().max()) for e in exact.values())
    off = [float((shares[key] - e).abs().max() / e.abs().max().clamp(_FLOOR * largest)) for key, e in exact.items()]
    return Row(
        name,
        parameters=sum(entries.values()),
        share=1 - sum(entries[key] for key in fallback) / sum(entries.values()),
        fallback=fallback,
        error=float((K - whole).abs().max() / whole.abs().max()),
        share_error=float(torch.tensor(off).max()),
        seconds=seconds,
        oracle=oracle,
    )


def reference_shares(model: torch.nn.Module, x1: Any, x2: Any, outputs: Any) -> dict[str, Tensor]:
    """Each parameter's share by the definition, a few parameters at a time so that no whole Jacobian is held."""
    shares: dict[str, Tensor] = {}
    chunk: list[str] = []
    sizes = {name: p.numel() for name, p in select_parameters(model, None).items()}
    for i, name in enumerate(sizes):
        chunk.append(name)
        if i + 1 == len(sizes) or sum(sizes[c] for c in chunk) > _CHUNK:
            j1, j2 = (jacobian(model, x, outputs, chunk) for x in (x1, x2))
            for c in chunk:
                share = torch.einsum("icp,jdp->ijcd", j1[c], j2[c])
                shares[c] = share[..., 0, 0] if callable(outputs) else share
            chunk = []
    return shares


def attempt(name: str) -> Row:
    """Measure, or say why there is nothing to measure."""
    family = FAMILIES[name]
    if reason := family.missing():
        return Row(name, skipped=reason)
    try:
        row = measure(family, name)
    except ntkit.Refused as error:
        return Row(name, **{"refused" if family.refused else "failed": str(error)})
    except Exception as error:
        return Row(name, failed=f"{type(error).__name__}: {error}")
    if family.refused:
        row.failed = "was not refused"
    return row


def cells(row: Row) -> list[str]:
    note = FAMILIES[row.name].note
    if row.skipped or row.failed or row.refused:
        kind = "not run" if row.skipped else "FAILED" if row.failed else "refused, as it should be"
        text = (row.skipped or row.failed or row.refused).splitlines()[0].replace("|", "/")
        return [row.name, "", "", f"{kind}: {text}", "", "", ""]
    reasons = Counter(row.fallback.values())
    slow = "; ".join(f"{count} parameter{'s' * (count > 1)}: {why}" for why, count in reasons.items())
    return [
        row.name,
        f"{row.parameters:,}",
        f"{row.share:.1%}",
        "; ".join(filter(None, (slow, note))),
        f"{row.error:.0e}",
        f"{row.share_error:.0e}",
        f"{row.seconds:.2f} / {row.oracle:.2f}",
    ]


def summary(rows: list[Row]) -> str:
    ran = [row for row in rows if not (row.skipped or row.failed or row.refused)]
    covered = sum(row.share >= FAST for row in ran)
    parts = [
        f"{covered} of {len(ran)} families have at least {FAST:.0%} of their parameter entries on the fast path",
        f"{sum(row.share == 1 for row in ran)} all of them",
    ]
    if ran:
        parts.append(f"the largest error is {max(max(row.error, row.share_error) for row in ran):.0e}")
    for word in ("refused", "skipped", "failed"):
        if number := sum(bool(getattr(row, word)) for row in rows):
            parts.append(f"{number} {'not run' if word == 'skipped' else word}")
    return "; ".join(parts) + "."


def document(rows: list[Row]) -> str:
    versions = [f"Python {platform.python_version()}", f"ntkit {ntkit.__version__}", f"torch {torch.__version__}"]
    for library in ("torchvision", "transformers"):
        if library in sys.modules:
            versions.append(f"{library} {sys.modules[library].__version__}")
    head = ["family", "parameters", "fast path", "by plain autograd, and notes", "error", "worst share", "seconds"]
    lines = [
        "# Coverage",
        "",
        "Made by `python -m benchmarks.coverage` "
        f"({', '.join(versions)}; {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}).",
        "Each family is a network of `benchmarks/families.py` with random weights, in float64. Its kernel of 3 x 2",
        "samples is compared with the oracle, per-sample autograd (`ntkit.jacobian.oracle`): *error* is the largest",
        "absolute error over the largest absolute value, *worst share* the same for the parameter whose share of the",
        f"kernel is worst (a share below {_FLOOR:.0e} of the largest is compared with that: some vanish by symmetry,",
        f"pure rounding). Both must stay below {BOUND:.0e}. *Fast path* is the part of the parameter entries",
        "that plain autograd need not compute sample by sample. *Seconds* are of the first call, self-check included,",
        "and of the oracle.",
        "",
        f"**{summary(rows)}**",
        "",
        "| " + " | ".join(head) + " |",
        "|---|--:|--:|---|--:|--:|--:|",
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in FAMILIES]:
        print(f"unknown: {', '.join(unknown)}. Known: {', '.join(FAMILIES)}")
        return 2
    rows = []
    for name in names or FAMILIES:
        rows.append(attempt(name))
        print("  ".join(filter(None, cells(rows[-1]))), flush=True)
    print(summary(rows))
    if not names:
        (ROOT / "docs" / "coverage.md").write_text(document(rows))
        if sum(row.share >= FAST for row in rows) < FAMILIES_COVERED:
            return 1
    return 0 if all(row.good() for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

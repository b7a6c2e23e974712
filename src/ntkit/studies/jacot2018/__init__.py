"""Jacot, Gabriel & Hongler 2018: the tangent kernel's limit, networks as Gaussian processes, learning by component.

The paper's three figures: the kernel on the circle before and after training, regression on four points against the
limit's percentiles, one principal component of a batch of digits. Every finished part is kept as a file.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ntkit.base.checks import refusal
from ntkit.base.files import ensure_folder, read_json, write_json
from ntkit.base.versions import versions
from ntkit.studies.jacot2018 import claims, component, kernel, page, regression
from ntkit.studies.jacot2018.found import Found
from ntkit.studies.jacot2018.sections import sections
from ntkit.studies.jacot2018.setting import Scale
from ntkit.studies.judged import one_thread
from ntkit.studies.parts import Say, Work

PAPER = {
    "authors": "Jacot, Gabriel, Hongler",
    "title": "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    "year": 2018,
    "reference": "NeurIPS 2018; arXiv 1806.07572",
}
FORMAT = 1

SCALES = {
    "quick": Scale(
        rate_widths=(125, 250, 500, 1_000), rate_seeds=20, kernel_widths=(500, 2_000), seeds=10, inputs=50,
        kernel_steps=200, curve_widths=(50, 1_000), curve_seeds=40, curve_steps=1_000,
        component_widths=(100, 250, 500), trials=2, batch=512, component_steps=3_000, batches=20,
    ),
    "paper": Scale(
        rate_widths=(125, 250, 500, 1_000, 2_000), rate_seeds=50, kernel_widths=(500, 10_000), seeds=10, inputs=50,
        kernel_steps=200, curve_widths=(50, 1_000), curve_seeds=40, curve_steps=1_000,
        component_widths=(100, 1_000, 10_000), trials=2, batch=512, component_steps=4_000, batches=60,
    ),
}  # fmt: skip


def run(scale: str, folder: Path, say: Say, data_dir: str | Path | None = None) -> Path:
    """Run what is not done yet, judge, write results and report."""
    s = SCALES[scale]
    ensure_folder(folder)
    data = "digits" if data_dir is None else "mnist"
    header = {"format": FORMAT, "kind": "study", "name": "jacot2018", "scale": scale, "sets": [data]}
    header |= {"sizes": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(s).items()}}
    start = folder / "run.json"
    if start.exists() and (found := read_json(start)) | header != found:
        raise refusal(str(folder), got="another run", expected="this study at this scale", fix="Name another --out.")
    write_json(start, header | {"versions": versions(), "status": "running"})
    with one_thread() if scale == "quick" else nullcontext():
        made = _experiments(Work(s, folder, data_dir, say), s, data)
    results: dict[str, Any] = header | {
        "title": "The neural tangent kernel and its limit",
        "paper": PAPER,
        "command": f"ntkit study jacot2018 --scale {scale}" + ("" if data_dir is None else " --data-dir FOLDER"),
        "certificate": page.certificate(made),
        "about": page.about(s, data),
        "departures": page.departures(s, data),
        "claims": claims.judge(s, made),
        "settings": header["sizes"],
        "versions": versions(),
        "sections": sections(s, made),
        "terms": ["tangent_kernel"],
    }
    write_json(folder / "results.json", results)
    from ntkit.report import render_study

    render_study(folder)
    write_json(start, read_json(start) | {"status": "complete"})
    return folder


def _experiments(work: Work, s: Scale, data: str) -> Found:
    """All parts, made or read."""
    return Found(
        rate=kernel.rate(work),
        kernels={n: [kernel.trained(work, n, seed) for seed in range(s.seeds)] for n in s.kernel_widths},
        curves={n: [regression.curves(work, n, seed) for seed in range(s.curve_seeds)] for n in s.curve_widths},
        data=data,
        eigenvalues=component.eigenvalues(work, data),
        learned={n: [component.learned(work, data, n, seed) for seed in range(s.trials)] for n in s.component_widths},
    )

"""Bell, Geyer, Glickenstein, Fernandez & Moore 2023: a trained network as an exact kernel machine.

Three clusters in the plane, images with a small convolutional network, the optimisers of today, what predictions are
made of, examples removed, and images of kinds that were not learned. Every finished part is kept as a file.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ntkit.base.checks import refusal
from ntkit.base.files import ensure_folder, read_json, write_arrays, write_json
from ntkit.base.versions import versions
from ntkit.studies.bell2023 import claims, page, pictures, plane, removal, unseen
from ntkit.studies.bell2023.found import Found
from ntkit.studies.bell2023.sections import sections
from ntkit.studies.bell2023.setting import Scale
from ntkit.studies.judged import one_thread
from ntkit.studies.parts import Say, Work

PAPER = {
    "authors": "Bell, Geyer, Glickenstein, Fernandez, Moore",
    "title": "An Exact Kernel Equivalence for Finite Classification Models",
    "year": 2023,
    "reference": "TAG-ML at ICML 2023, PMLR 221, 206-217; arXiv 2308.00824",
}
FORMAT = 1
SEEDS = (0, 1, 2)
MAPPED = ("relu", 0)  # the run in the plane that the maps show: activation and seed

SCALES = {
    "quick": Scale(
        plane_steps=20, side=48, direct=1, nodes=(1, 2, 5, 10, 20, 50, 200), probed=25, pixels=8, width=8,
        train=300, test=100, steps=100, lr=0.2, other_steps=60, removals=12, shares=(0.02, 0.05), draws=4, unseen=100,
        unseen_steps=60,
    ),
    "paper": Scale(
        plane_steps=20, side=96, direct=200, nodes=(1, 2, 5, 10, 20, 50, 200), probed=100, pixels=28, width=8,
        train=1_000, test=100, steps=200, lr=0.2, other_steps=200, removals=50,
        shares=(0.01, 0.02, 0.05), draws=10, unseen=200, unseen_steps=100,
    ),
}  # fmt: skip


def run(scale: str, folder: Path, say: Say, data_dir: str | Path | None = None) -> Path:
    """Run what is not done yet, judge, write results and report."""
    s = SCALES[scale]
    ensure_folder(folder)
    sets = ["digits", *([] if data_dir is None else ["mnist"])]
    header = {"format": FORMAT, "kind": "study", "name": "bell2023", "scale": scale, "sets": sets}
    header |= {"seeds": list(SEEDS), "sizes": {k: list(v) if isinstance(v, tuple) else v for k, v in vars(s).items()}}
    start = folder / "run.json"
    if start.exists() and (found := read_json(start)) | header != found:
        raise refusal(str(folder), got="another run", expected="this study at this scale", fix="Name another --out.")
    write_json(start, header | {"versions": versions(), "status": "running"})
    with one_thread() if scale == "quick" else nullcontext():
        found = _experiments(Work(s, folder, data_dir, say), sets)
    shown, arrays = sections(s, found)
    write_arrays(folder / "figures.safetensors", arrays)
    results: dict[str, Any] = header | {
        "title": "A trained network as an exact kernel machine",
        "paper": PAPER,
        "command": f"ntkit study bell2023 --scale {scale}" + ("" if data_dir is None else " --data-dir FOLDER"),
        "certificate": page.certificate(found),
        "about": page.about(s, sets, len(SEEDS)),
        "departures": page.departures(data_dir is not None),
        "claims": claims.judge(s, found),
        "settings": header["sizes"],
        "versions": versions(),
        "sections": shown,
        "terms": ["path_kernel", "secant", "other_gradients", "novelty", "tangent_kernel"],
    }
    write_json(folder / "results.json", results)
    from ntkit.report import render_study

    render_study(folder)
    write_json(start, read_json(start) | {"status": "complete"})
    return folder


def _experiments(work: Work, sets: list[str]) -> Found:
    """All parts, made or read."""
    return Found(
        plane={name: [plane.measure(work, name, seed) for seed in SEEDS] for name in plane.ACTIVATIONS},
        maps=plane.maps(work, *MAPPED),
        images={name: [pictures.measure(work, name, seed) for seed in SEEDS] for name in sets},
        nodes={name: pictures.nodes(work, name) for name in sets},
        recipes={name: [pictures.optimizer(work, name, seed) for seed in SEEDS] for name in pictures.RECIPES},
        explained={name: pictures.explained(work, name) for name in sets},
        removed={name: [removal.remove(work, name, i) for i in range(work.scale.removals)] for name in sets},
        unseen={name: [unseen.tell_apart(work, name, seed) for seed in SEEDS] for name in sets},
    )

"""The report: what each picture's eigenfunctions look like, learning speeds, constant kernels, the decay, curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ntkit.studies.claim import Estimate, mean
from ntkit.studies.kopitkov2019.constant_kernel import ratios
from ntkit.studies.kopitkov2019.decay import PLACES, curves_of, gaps, pairs
from ntkit.studies.kopitkov2019.kopitkov_setting import DEPTHS, DISPLACED, PICTURES, energy, file_of, picture, text
from ntkit.studies.kopitkov2019.learned_pictures import DEEP, SHOWN, deep_runs
from ntkit.studies.kopitkov2019.learning_speed import points
from ntkit.studies.part import Result
from ntkit.studies.study import Item, Results, Section, curve, lines, table
from ntkit.tracking.snapshot_numbers import finite

STAGES = ("before training", "after training")
FLAT = 1e-12  # a loss below it is drawn there: float32 has nothing to say about it


def start_and_end(results: Results) -> dict[str, list[Estimate]]:
    """Energy of each picture in the top eigenfunctions before it is learned and after, by picture."""
    return {
        name: [mean([r.numbers["energies"][name][i] for r in runs]) for i in (0, 1)]
        for name, runs in deep_runs(results).items()
    }


def certificate(results: Results) -> dict[str, Any]:
    """Which pictures have much energy in the untrained kernel's top eigenfunctions, before anything is claimed."""
    k, found = results.work.sizes.top, start_and_end(results)
    little, much = (
        [name for name, (start, _) in found.items() if (start.value >= 0.5) is side] for side in (False, True)
    )
    told = ", ".join(f"{name} {start.value:.2f}" for name, (start, _) in found.items())
    return {
        "text": f"Energy of the pictures in the top {k} eigenfunctions of untrained networks: {told}. "
        f"Little of it: {', '.join(little) or 'none'}; much: {', '.join(much) or 'none'}.",
        "cards": [
            {"name": name, "big": f"{start.value:.2f} → {end.value:.2f}", "small": f"energy in the top {k}"}
            for name, (start, end) in found.items()
        ],
        "table": {
            "title": f"Energy in the top {k} eigenfunctions at the end, by picture learned",
            "columns": ["Learned", "At the start", *(f"{name}, at the end" for name in (*PICTURES, DISPLACED))],
            "rows": [
                [
                    name,
                    f"{found[name][0]:.2f}",
                    *(text([r.numbers["energies"][o][1] for r in runs]) for o in (*PICTURES, DISPLACED)),
                ]
                for name, runs in deep_runs(results).items()
            ],
        },
    }


def sections(results: Results) -> Iterator[Section]:
    """Sections in the order of the paper's sentences."""
    deep = deep_runs(results)
    if not deep:
        return
    yield _eigenfunctions(results, deep)
    rates, arrays = _rates(results, deep)
    yield Section(
        "How fast is each eigenfunction learned?", "Speed",
        "One plain step of gradient descent from every snapshot. To first order it removes the share learning rate × "
        "eigenvalue / N of the residual’s component along each eigenvector.",
        [_shares(results, deep), *rates], arrays,
    )  # fmt: skip
    yield Section(
        "Does alignment improve the optimization?", "Constant kernels",
        "The loss of the run, beside that of kernels which do not change: the first one, and the last one scaled to "
        "the trace of the first, so that only its directions differ. Both in closed form, by all eigenpairs, for the "
        "same steps and learning rates.",
        [_losses(deep), _ratios(deep)],
    )  # fmt: skip
    if pairs(results):
        yield _decay(results)


def _eigenfunctions(results: Results, deep: dict[str, list[Result]]) -> Section:
    side, arrays, cases = results.work.sizes.side, {}, []
    for name, runs in deep.items():
        key = f"eigenfunctions/{name}"
        arrays[f"{key}/picture"] = _gray(picture(name, side).reshape(1, side, side).numpy())[0]
        strips = []
        for i, stage in enumerate(STAGES):
            arrays[f"{key}/{i}"] = _gray(runs[0].arrays["shown"][i])
            values = runs[0].arrays["eigenvalues"][[0, -1][i]]
            images = [
                {"image": [f"{key}/{i}", [j]], "caption": f"{j + 1}", "value": f"λ {values[j]:.3g}", "other": False}
                for j in range(SHOWN)
            ]
            strips.append({"heading": stage, "images": images})
        cases.append({"image": [f"{key}/picture", []], "text": f"Learned: {name}.", "strips": strips})
    item = {"kind": "images", "title": "The top eigenfunctions on the points, first seed", "cases": cases}
    text_of = f"The first {SHOWN} eigenvectors of the kernel on the points, as images, for networks of depth {DEEP}."
    return Section("What do the top eigenfunctions look like?", "Images", text_of, [item], arrays)


def _gray(images: np.ndarray) -> np.ndarray:
    """Images [q, H, W] from 0 to 255, each between its least and largest value: uint8 [q, H, W, 1]."""
    low, high = (f(images, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return np.rint(255 * (images - low) / np.maximum(high - low, 1e-30)).astype(np.uint8)[..., None]


def _shares(results: Results, deep: dict[str, list[Result]]) -> Item:
    panels = []
    for name, runs in deep.items():
        steps = [max(step, 0.5) for step in runs[0].numbers["steps"]]
        rows = np.array([r.arrays["removed_parts"] for r in runs])
        parts = (f"top {results.work.sizes.top}", rows[..., 0]), ("the rest", rows[..., 1])
        series = []
        for what, values in parts:
            kept = values.mean(0) > 0  # a logarithm; steps in which the part grows have none
            own = [[v for v, k in zip(row, kept, strict=True) if k] for row in (steps, values.mean(0).tolist())]
            series.append(curve(what, *own))
        panels.append((name, series))
    return lines(
        "Share of the residual that one step removes",
        "The residual’s part in the top eigenfunctions and the rest, mean over seeds. Above 1 a step overshoots; steps "
        "at which a part grows are left out. Step 0 is drawn at 0.5.",
        "step", "share removed", panels, log="xy", wide=True,
    )  # fmt: skip


def _rates(results: Results, deep: dict[str, list[Result]]) -> tuple[list[Item], dict[str, np.ndarray]]:
    n = results.work.sizes.side**2
    panels, arrays = [], {}
    for name, runs in deep.items():
        count = len(runs[0].arrays["removed"])
        found = [points(runs[0], row, n) for row in range(0, count, max(1, count // 8))]
        x, y = (np.concatenate([pair[i] for pair in found]) for i in (0, 1))
        kept = y > 0
        if kept.any():
            keys = {axis: f"rates/{name}/{axis}" for axis in ("x", "y")}
            arrays |= {keys["x"]: np.log10(x[kept]), keys["y"]: np.log10(y[kept])}
            panels.append({"heading": name, **keys})
    reading = (
        "Share removed × N / learning rate, for components with at least 1/N of the residual, some snapshots of the "
        "first seed. On the line both are equal."
    )
    item = {"kind": "scatter", "title": "Rate of each component against its eigenvalue", "reading": reading}
    item |= {"x": "log₁₀ eigenvalue", "y": "log₁₀ rate", "panels": panels}
    return [item] if panels else [], arrays


def _losses(deep: dict[str, list[Result]]) -> Item:
    panels = []
    for name, runs in deep.items():
        steps = [max(step, 0.5) for step in runs[0].numbers["steps"]]
        told = [r.numbers["constant_kernel"] for r in runs]
        rows = {
            "the run": [r.numbers["series"]["loss"] for r in runs],
            "first kernel": [t["first"]["learned"] for t in told],
            "last kernel, scaled": [t["last"]["learned"] for t in told],
        }
        means = {what: np.maximum(np.mean(values, axis=0), FLAT).tolist() for what, values in rows.items()}
        panels.append((name, [curve(what, steps, values) for what, values in means.items()]))
    reading = "Mean over seeds. Step 0 is drawn at 0.5."
    return lines("Loss, with a kernel that changes and without", reading, "step", "loss", panels, log="xy", wide=True)


def _ratios(deep: dict[str, list[Result]]) -> Item:
    rows = [
        [name, text(ratios(runs, "changing")), text(ratios(runs, "last")), text(ratios(runs, "last", DISPLACED))]
        for name, runs in deep.items()
    ]
    columns = ["Learned", "The run", "Last kernel, scaled", "Last kernel, scaled, for the displaced picture"]
    note = "Logarithm (base 10) of the loss at the end over that with the constant first kernel, for the same target."
    return table("Losses at the end against the first kernel’s", columns, rows, note)


def _decay(results: Results) -> Section:
    s, both = results.work.sizes, pairs(results)
    items = []
    titles = {"λ1": "Largest eigenvalue", "trace": "Trace", "energy": f"Energy of the target in the top {s.top}"}
    for what, title in titles.items():
        series = []
        for place, name in enumerate(("with decay", "without")):
            kept = [step for step in both[0][place].numbers["steps"] if step >= s.decay]
            values = [mean(v) for v in np.array([curves_of(pair[place], s.top, s.decay)[what] for pair in both]).T]
            series.append(curve(name, kept, [v.value for v in values], error=[v.error for v in values]))
        if what == "λ1":
            for name, factor in (("2N / halved rate", 2), ("2N / rate", 1)):
                level = factor * 2 * s.side**2 / s.lr
                series.append(curve(name, [s.decay, s.steps], [level, level], dash="dash"))
        items.append(lines(title, f"From the decay on, at step {s.decay:,}.", "step", title.lower(), [("", series)]))
    names = [
        what
        for what in (*(f"λ{i}" for i in PLACES), "trace", "energy", "loss")
        if what in curves_of(both[0][0], s.top, s.decay)
    ]
    rows = [[what.replace("energy", f"E(target, {s.top})"), text(gaps(results, what), 3)] for what in names]
    note = "Logarithm (base 10) of the ratio; the energy as a difference. Paired by seed."
    items.append(table("At the end, with decay against without", ["", "Difference"], rows, note))
    about = f"The learning rate is halved at step {s.decay:,}; from the snapshot there a second run goes on without it."
    return Section("What does the decay of the learning rate do?", "Decay", about, items)


def curves_and_runs(results: Results) -> dict[str, Any]:
    """Curves as means over seeds, and the runs that have pages of their own."""
    s, seeds = results.work.sizes, results.work.seeds[: results.work.sizes.seeds]
    cases = results["picture"]
    by_depth = [_group(f"depth {d}", cases[PICTURES[0], d], s.top, seeds) for d in DEPTHS if (PICTURES[0], d) in cases]
    by_picture = [_group(name, runs, s.top, seeds) for name, runs in deep_runs(results).items()]
    curves = [{"title": f"{PICTURES[0].capitalize()}, by depth", "groups": by_depth}]
    curves.append({"title": f"Depth {DEEP}, by picture", "groups": by_picture})
    first = [(file_of(name, depth, seeds[0]), f"{name}, depth {depth}") for name, depth in cases]
    pages = sorted(first, key=lambda page: page[0] != file_of(PICTURES[0], DEEP, seeds[0]))
    for data in results.work.sets:
        groups = [_group(optimizer, runs, 10, seeds) for optimizer, runs in results[data].items()]
        curves.append({"title": f"{data}, by optimizer", "groups": groups})
        pages += [(f"{data}-{optimizer}-seed-{seeds[0]}", f"{data}, {optimizer}") for optimizer in results[data]]
    runs = [{"name": name, "title": title, "track": f"runs/{name}/track"} for name, title in pages]
    there = [run for run in runs if (results.work.folder / run["track"]).exists()]
    return {"curves": [entry for entry in curves if entry["groups"]], "runs": there}


def _group(name: str, runs: list[Result], k: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Means over seeds and their standard errors, for the curves."""
    series: dict[str, list[Any]]
    series = {f"energy_{what}": [energy(r, what, k) for r in runs] for what in ("target", "output", "residual")}
    plain = ("loss", "sharpness", "alignment_centered", "distance", "first_order_error")
    series |= {what: [r.numbers["series"][what] for r in runs] for what in plain}
    if name not in ("momentum", "adam"):  # 2 / learning rate bounds plain steps
        series["bound"] = [[2 / lr if lr else None for lr in r.numbers["series"]["learning_rate"]] for r in runs]
    series["lambda_1"] = [r.arrays["eigenvalues"][:, 0] for r in runs]
    curves = {}
    for what, rows in series.items():
        a = np.asarray(rows, dtype=float)  # None becomes NaN
        error = a.std(0, ddof=1) / len(a) ** 0.5 if len(a) > 1 else np.full(a.shape[1], np.nan)
        by_step = {"mean": a.mean(0), "error": error}
        curves[what] = {name: [finite(v) for v in values.tolist()] for name, values in by_step.items()}
    return {
        "name": name,
        "seeds": list(seeds[: len(runs)]),
        "steps": runs[0].numbers["steps"],
        "series": curves,
        "energy_k": k,
    }

"""The figures of kernel matrices and of who takes which class for which: pure functions of results and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ntkit.report import draw
from ntkit.report.draw import ROLES, Figure, Panel
from ntkit.report.words import listed, plain, share

Arrays = Mapping[str, np.ndarray]
FigureAndReading = tuple[Figure, str]

_KERNELS = {"init": "before training", "after": "after training", "conjugate": "last hidden layer"}
_DRAWN = 60  # eigenvalues of a spectrum that are drawn, spaced evenly on a logarithmic axis
_WRITTEN = 12  # classes up to which counts are written into a matrix, and named on its axes
_NAMED = 20  # characters of a class name on an axis, over all classes of a side


def gram_pictures(results: dict[str, Any], arrays: Mapping[str, Arrays]) -> FigureAndReading | None:
    """Kernel matrices of some training examples, in the order of their classes or targets; None without arrays."""
    panels, texts = [], []
    kernels = [key for key in ("init", "after") if "picture" in arrays.get(f"gram-{key}", {})]
    if not kernels:
        return None
    counts = next((q.get("pictured") for q in results["quality"] if q["kernel"] == kernels[0]), None) or []
    n = len(arrays[f"gram-{kernels[0]}"]["picture"])
    ticks = _blocks(results["data"]["classes"], counts)
    for key in kernels:
        values = arrays[f"gram-{key}"]["picture"].astype(np.float64)
        axes = [draw.axis("", showgrid=False, constrain="domain", **ticks) for _ in range(2)]
        axes[1] |= {"scaleanchor": "x", "autorange": "reversed"}
        layout = draw.layout(*axes, height=330)
        layout["margin"] |= {"l": 40, "r": 8}
        heat = draw.heat(values, "ramp", "example %{x}, %{y}: cosine %{z:.3f}")
        panels.append(Panel(f"plot-gram-{key}", _KERNELS[key], [heat], layout))
        if counts:
            texts.append(tuple(plain(v, 2) for v in _within_and_between(values, counts)))
    order = "their class" if results["data"]["classes"] else "the first target, smallest first"
    reading = f"Cosines of {n} training examples, in the order of {order}; each matrix has its own scale of colors."
    if texts:
        within, between = (" → ".join(t[i] for t in texts) for i in (0, 1))
        when = "before → after" if len(texts) > 1 else _KERNELS[kernels[0]]
        reading += f" Mean cosine of two examples of one class, {when}: {within}; of two classes: {between}."
    figure = Figure("gram", "The kernel matrix", f"Pictures of kernel matrices. {reading}", panels, wide=True)
    return figure, reading


def _blocks(classes: Sequence[str], counts: Sequence[int]) -> dict[str, Any]:
    """Ticks in the middle of each class's block."""
    if not counts:
        return {"tickvals": [], "ticktext": []}
    blocks = [(c, count, end) for c, count, end in zip(classes, counts, np.cumsum(counts), strict=False) if count]
    return {
        "tickvals": [float(end - count / 2 - 0.5) for _, count, end in blocks],
        "ticktext": [draw.safe(_short(c, len(blocks))) for c, _, _ in blocks],
    }


def _short(name: str, count: int) -> str:
    most = max(3, 5 * _NAMED // max(1, count))
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _within_and_between(values: np.ndarray, counts: Sequence[int]) -> tuple[float | None, float | None]:
    """Mean cosine of two different examples of one class, and of two classes."""
    labels = np.repeat(np.arange(len(counts)), counts)
    same = labels[:, None] == labels
    off = ~np.eye(len(values), dtype=bool)
    means = [values[part & np.isfinite(values)] for part in (same & off, ~same)]
    within, between = (float(part.mean()) if len(part) else None for part in means)
    return within, between


def spectra(results: dict[str, Any], arrays: Mapping[str, Arrays]) -> FigureAndReading | None:
    """All eigenvalues of each kernel on the training set, as shares of the trace; None without arrays."""
    data, legend, texts = [], [], []
    found = {key: arrays.get(f"gram-{key}", {}) for key in _KERNELS}
    shown = {key: own["eigenvalues"] for key, own in found.items() if "eigenvalues" in own}
    if not shown:
        return None
    n = max(map(len, shown.values()))
    places = np.unique(np.round(np.geomspace(1, n, _DRAWN)).astype(int))
    for key, values in shown.items():
        total = float(values.sum())
        name, color, symbol = ROLES[key]
        if not total > 0:
            continue
        shares = 100 * values / total
        floor = 100 * float(values[0]) / total * np.finfo(np.float32).eps  # of float32 values: rounding alone below it
        drawn = [float(f"{shares[i - 1]:.4g}") if shares[i - 1] > floor else None for i in places]
        trace = draw.against_index(drawn, name, color, symbol, f"{name}, eigenvalue %{{x}}: %{{y:.3g}} %")
        data.append(trace | {"x": places.tolist(), "customdata": places.tolist()})
        data[-1]["marker"]["size"] = 5
        legend.append((name, color, symbol))
        half = int(np.searchsorted(np.cumsum(values), 0.9 * total) + 1)
        texts.append(f"{half:,} ({name})")
    if not data:
        return None
    reading = (
        f"Eigenvalues on the training set: {max(len(t['x']) for t in data):,} of {n:,} are drawn, none below rounding. "
        "Eigenvalues that hold "
        f"{share(0.9)} of the trace: {listed(texts)}."
    )
    y = draw.log_axis("% of the trace", [v for trace in data for v in trace["y"]])
    layout = draw.layout(draw.index_axis("index", n), y, height=330)
    figure = Figure("full-spectrum", "Spectrum", f"Eigenvalues against index. {reading}",
                    [Panel("plot-full-spectrum", "", data, layout)], legend, wide=True)  # fmt: skip
    return figure, reading


def _most_often(table: np.ndarray, classes: Sequence[str]) -> str:
    """How many answers are wrong, and the pair of classes with most of them, if there is one.

    >>> _most_often(np.array([[5, 2], [1, 4]]), ["a", "b"]), _most_often(np.array([[5, 1], [1, 4]]), ["a", "b"])
    ('3, most often a taken for b (2 of 7)', '2, at most 1 of one pair of classes')
    """
    wrong = table - np.diag(np.diag(table))
    most = int(wrong.max())
    if most == 0:
        return "none"
    if (wrong == most).sum() > 1:
        return f"{wrong.sum():,}, at most {most:,} of one pair of classes"
    i, j = divmod(int(wrong.argmax()), wrong.shape[1])
    return f"{wrong.sum():,}, most often {classes[i]} taken for {classes[j]} ({most:,} of {table[i].sum():,})"


def confusion(results: dict[str, Any]) -> FigureAndReading | None:
    """Which class is taken for which, by the network and by the after kernel's machine; None in earlier runs."""
    classes = results["data"]["classes"]
    after = next((m for m in results["machines"] if m["kernel"] == "after"), {})
    entries = [("network", results["network"].get("confusion")), ("after", after.get("confusion"))]
    panels, texts = [], []
    for who, counts in entries:
        if counts is None:
            continue
        name = "network" if who == "network" else "after kernel"
        table = np.asarray(counts)
        rows = table / np.maximum(table.sum(1, keepdims=True), 1)
        heat = draw.heat(100 * rows, "ramp", "%{customdata}<extra></extra>") | {"zmin": 0, "zmax": 100}
        heat["colorscale"][0] = [0, "var(--card)"]  # a class never taken for another has no color
        heat["customdata"] = [
            [f"{draw.safe(a)} taken for {draw.safe(b)}: {table[i, j]}" for j, b in enumerate(classes)]
            for i, a in enumerate(classes)
        ]
        if len(classes) <= _WRITTEN:
            heat |= {"text": table.tolist(), "texttemplate": "%{text}"}
        every = max(1, -(-len(classes) // _WRITTEN))
        ticks = list(range(0, len(classes), every))
        names = [draw.safe(_short(classes[i], len(ticks))) for i in ticks]
        x = draw.axis("answer", tickvals=ticks, ticktext=names, showgrid=False, constrain="domain")
        y = draw.axis("class", tickvals=ticks, ticktext=names, showgrid=False, scaleanchor="x", autorange="reversed")
        panels.append(Panel(f"plot-confusion-{who}", name, [heat], draw.layout(x, y, height=340)))
        texts.append(f"{name}: {_most_often(table, classes)}")
    if not panels:
        return None
    reading = f"Test examples, wrong answers: {'; '.join(texts)}. Colors are shares of a class, in percent."
    figure = Figure("confusion", "Which class is taken for which", f"Confusion matrices. {reading}", panels, wide=True)
    return figure, reading

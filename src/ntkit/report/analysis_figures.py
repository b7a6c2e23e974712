"""The figures of `analyze`: pure functions of its results. Those along training also serve other reports."""

from __future__ import annotations

from typing import Any

from ntkit.report import draw
from ntkit.report.analysis_text import DISRUPTIVE
from ntkit.report.draw import Figure, Panel
from ntkit.report.words import listed, percent, plain

ROLES = {
    "network": ("network", "var(--network)", "x"),
    "init": ("initialisation", "var(--init)", "circle"),
    "after": ("after kernel", "var(--after)", "diamond"),
    "conjugate": ("conjugate", "var(--conjugate)", "square"),
}
ENERGIES = (("targets", "of the targets"), ("outputs", "of the outputs"), ("residual", "of the residual"))


def machines(results: dict[str, Any]) -> Figure:
    """Test error of the network and of the SVM on each kernel, with standard errors.

    Examples
    --------
    >>> error = {"value": 0.025, "error": 0.008}
    >>> machines({"network": {"test_error": error}, "machines": []}).panels[0].data[0]["x"]
    [2.5]
    """
    rows = [("network", "network", results["network"]["test_error"])]
    rows += [(m["kernel"], m["label"], m["test_error"]) for m in results["machines"]]
    data = []
    for place, (kernel, label, error) in enumerate(rows):
        if error["value"] is None:
            continue
        dot = _dot(kernel, 100 * error["value"], draw.times(error["error"], 100), len(rows) - 1 - place, label)
        dot |= {"mode": "markers+text", "text": [percent(error, False)], "textposition": "top center"}
        dot["hovertemplate"] = f"{draw.safe(label)}<br>{percent(error)}<extra></extra>"
        dot["cliponaxis"] = False
        data.append(dot)
    layout = draw.layout(
        draw.axis("test error, %", rangemode="tozero"),
        draw.rows_axis([ROLES.get(kernel, (label,))[0] for kernel, label, _ in rows]),
        height=80 + 48 * len(rows),
    )
    told = "; ".join(f"{label} {percent(error)}" for _, label, error in rows)
    return Figure("machines", "Test error of the machines", f"Dot plot of test errors: {told}.", [
        Panel("plot-machines", "", data, layout)
    ], wide=True)  # fmt: skip


def invariances(results: dict[str, Any]) -> Figure:
    """Cosine between an image and its transform, per kernel and transformation."""
    rows = results["invariances"]["rows"]
    groups = [
        ("gentle", "Small changes (higher: more invariant)", [r for r in rows if r["name"] not in DISRUPTIVE]),
        ("broken", "Broken layout (lower: more global)", [r for r in rows if r["name"] in DISRUPTIVE]),
    ]
    groups = [group for group in groups if group[2]]
    panels, told = [], []
    keys = (("init", "before"), ("after", "after"), ("conjugate", "conjugate"))
    for name, heading, members in groups:
        data = []
        for place, row in enumerate(members):
            for rank, (role, key) in enumerate(keys):
                value = row[key]["value"]
                if value is None:
                    continue
                height = len(members) - 1 - place + 0.22 * (1 - rank)
                dot = _dot(role, value, row[key]["error"], height, row["name"])
                spread = "" if row[key]["error"] is None else f" ± {row[key]['error']:.3f}"
                dot["hovertemplate"] = (
                    f"{draw.safe(row['name'])}, {ROLES[role][0]}<br>{value:.3f}{spread}<extra></extra>"
                )
                data.append(dot)
                told.append(f"{row['name']} {ROLES[role][0]} {value:.2f}")
        layout = draw.layout(
            draw.axis("cosine"), draw.rows_axis([r["name"] for r in members]), height=80 + 68 * len(members)
        )
        panels.append(Panel(f"plot-invariance-{name}", heading, data, layout))
    label = f"Dot plots of mean cosines between image and transformed image: {', '.join(told)}."
    return Figure("invariance", "Similarity of an image to its own transform", label, panels, _legend(
        "init", "after", "conjugate"
    ), wide=True)  # fmt: skip


def along(results: dict[str, Any]) -> list[Figure]:
    """All figures of the kernel along training; the first snapshot is drawn in the initial kernel's colour."""
    a = results["along"]
    first = losses(a, results["training"]), eigenvalues(a), alignment(a), _distance(a)
    return [*first, energies(a), size(a), _spectra(a)]


def losses(a: dict[str, Any], training: dict[str, Any] | None) -> Figure:
    """Loss against step: of the points followed and, where known, of each step's own batch."""
    data = []
    if training is not None:
        # entry s is the loss before step s: at the parameters of snapshot s, like the other curve
        steps = list(range(len(training["losses"])))
        data.append(draw.line(steps, training["losses"], "minibatch", "var(--faint)", width=1.2))
    data.append(draw.line(a["steps"], a["losses"], f"{a['points']} points", "var(--after)", ends=True))
    last = max([*a["steps"], len(training["losses"]) if training else 0])
    seen = a["losses"] + (training["losses"] if training else [])
    layout = draw.layout(draw.step_axis(last), draw.log_axis("loss", seen))
    legend = [
        ("each step's own batch", "var(--faint)", "line"),
        (f"all {a['points']} followed points", "var(--after)", "line"),
    ]
    label = f"Loss against step, from {draw.told(a['losses'][0])} to {draw.told(a['losses'][-1])}."
    return Figure("loss", "Loss", label, [Panel("plot-loss", "", data, layout)], legend if training else legend[1:])


def eigenvalues(a: dict[str, Any]) -> Figure:
    """Largest eigenvalues against step, with 2 n / learning rate where ``lr`` and ``stable_lr`` are known."""
    count = len(a["eigenvalues"][0])
    data = []
    for i in reversed(range(count)):
        values = [row[i] for row in a["eigenvalues"]]
        trace = draw.line(a["steps"], values, f"λ<sub>{i + 1}</sub>", "var(--after)", width=1.1, ends=i == 0)
        trace["opacity"] = max(0.25, 0.8 - 0.6 * i / max(1, count - 1)) if i else 1.0
        trace["line"]["width"] = 1.1 if i else 2.6
        data.append(trace)
    legend = [("largest, λ₁", "var(--after)", "line")]
    if count > 1:
        legend.append((f"the next {count - 1}", "var(--after)", "thin"))
    label = f"Largest {count} eigenvalues against step; the first goes from {draw.told(a['eigenvalues'][0][0])} to "
    label += f"{draw.told(a['eigenvalues'][-1][0])}"
    if a["lr"] and a["stable_lr"]:
        bound = 2 * a["points"] / a["lr"]
        ends = [draw.place(a["steps"][0]), draw.place(a["steps"][-1])]
        data.append({
            "type": "scatter", "mode": "lines", "x": ends, "y": [bound, bound], "name": "2n / learning rate",
            "line": {"color": "var(--network)", "width": 1.6, "dash": "dash"},
            "hovertemplate": f"2n / learning rate = {bound:.4g}<extra></extra>",
        })  # fmt: skip
        legend.append((f"2n / learning rate = {plain(bound)}", "var(--network)", "dash"))
        label += f"; the bound 2n over learning rate is {plain(bound)}"
    seen = [v for trace in data for v in trace["y"]]
    layout = draw.layout(draw.step_axis(a["steps"][-1]), draw.log_axis("eigenvalue", seen))
    return Figure("eigenvalues", "Largest eigenvalues", label + ".", [
        Panel("plot-eigenvalues", "", data, layout)
    ], legend)  # fmt: skip


def alignment(a: dict[str, Any]) -> Figure:
    """Alignment with the targets against step."""
    data = [
        draw.line(a["steps"], a["alignment_centered"], "centred", "var(--after)", ends=True),
        draw.line(a["steps"], a["alignment"], "not centred", "var(--after)", dash="dot", width=1.6),
    ]
    layout = draw.layout(draw.step_axis(a["steps"][-1]), draw.axis("alignment", range=[-0.02, 1.02]))
    label = f"Alignment with the targets against step; centred, from {draw.told(a['alignment_centered'][0])} to "
    label += f"{draw.told(a['alignment_centered'][-1])}."
    return Figure("alignment", "Alignment with the targets", label, [Panel("plot-alignment", "", data, layout)], [
        ("centred", "var(--after)", "line"), ("not centred", "var(--after)", "dot")
    ])  # fmt: skip


def _distance(a: dict[str, Any]) -> Figure:
    data = [draw.line(a["steps"], a["distance_to_init"], "1 − cosine", "var(--after)", ends=True)]
    layout = draw.layout(draw.step_axis(a["steps"][-1]), draw.axis("1 − cosine", rangemode="tozero"))
    label = f"Distance of the kernel to the initial one against step, ending at {draw.told(a['distance_to_init'][-1])}."
    return Figure("distance", "Distance to the initial kernel", label, [Panel("plot-distance", "", data, layout)])


def energies(a: dict[str, Any]) -> Figure:
    """Energy of targets, outputs and residual (those that `a` has) in the top k eigenvectors against step."""
    ks, panels, legend, pairs = a["energy_ks"], [], [], []
    for name, heading in ENERGIES:
        rows = a.get(f"energy_{name}")
        if rows is None:
            continue
        data, legend = draw.family(a["steps"], [(f"top {k}", [row[i] for row in rows]) for i, k in enumerate(ks)])
        layout = draw.layout(draw.step_axis(a["steps"][-1]), draw.axis("", range=[-0.02, 1.02]), height=260)
        layout["margin"] |= {"l": 34, "r": 8}
        panels.append(Panel(f"plot-energy-{name}", heading, data, layout))
        pairs.append(f"{name} {draw.told(rows[0][-1])} to {draw.told(rows[-1][-1])}")
    label = f"Share of energy in the top {ks[-1]} eigenvectors from first to last step: {', '.join(pairs)}."
    return Figure("energy", "Energy in the top eigenvectors", label, panels, legend, wide=True)


def size(a: dict[str, Any]) -> Figure:
    """Trace and effective rank against step, and the condition number where `a` has it."""
    panels, told = [], []
    for name, heading in (("trace", "trace"), ("effective_rank", "effective rank"), ("condition", "condition number")):
        if name not in a:
            continue
        data = [draw.line(a["steps"], a[name], heading, "var(--after)", ends=True)]
        y = draw.log_axis("", a[name]) if name == "condition" else draw.axis("", rangemode="tozero")
        layout = draw.layout(draw.step_axis(a["steps"][-1]), y, height=260)
        panels.append(Panel(f"plot-{name.replace('_', '-')}", heading, data, layout))
        told.append(f"{heading} from {draw.told(a[name][0])} to {draw.told(a[name][-1])}")
    title, label = listed([panel.heading for panel in panels]), f"Against step: {listed(told)}."
    return Figure("size", title[0].upper() + title[1:], label, panels, wide=len(panels) > 2)


def _spectra(a: dict[str, Any]) -> Figure:
    data = []
    for row, role, when in ((0, "init", "first"), (-1, "after", "last")):
        whole = a["trace"][row]
        shares = [draw.times(value, 100 / whole) if whole else None for value in a["eigenvalues"][row]]
        name, hover = f"step {a['steps'][row]}", f"eigenvalue %{{x}}, {when} step: %{{y:.3g}} %"
        shown = [draw.positive(v) for v in shares]
        data.append(draw.against_index(shown, name, ROLES[role][1], ROLES[role][2], hover))
    x = draw.index_axis("index", len(a["eigenvalues"][0]))
    seen = [v for trace in data for v in trace["y"]]
    layout = draw.layout(x, draw.log_axis("% of the trace", seen), height=286)
    shown = [trace["y"][0] for trace in data]
    label = f"Spectrum at the first and last step; the first eigenvalue holds {draw.told(shown[0])} and "
    label += f"{draw.told(shown[1])} percent of the trace."
    legend = [("first step", "var(--init)", "circle"), ("last step", "var(--after)", "diamond")]
    return Figure(
        "spectrum", "Spectrum at the start and the end", label, [Panel("plot-spectrum", "", data, layout)], legend
    )


def _dot(role: str, x: float, error: float | None, y: float, name: str) -> dict[str, Any]:
    _, colour, symbol = ROLES.get(role, ("", "var(--network)", "circle"))
    dot: dict[str, Any] = {
        "type": "scatter", "mode": "markers", "x": [x], "y": [y], "name": draw.safe(name),
        "marker": {"color": colour, "symbol": symbol, "size": 10},
    }  # fmt: skip
    if error is not None:
        dot["error_x"] = {"type": "data", "array": [error], "color": colour, "thickness": 1.8, "width": 5}
    return dot


def _legend(*roles: str) -> list[tuple[str, str, str]]:
    return [(ROLES[role][0], ROLES[role][1], ROLES[role][2]) for role in roles]

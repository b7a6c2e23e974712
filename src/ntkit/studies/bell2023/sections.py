"""The report's sections, with figures, tables and images, as ``results.json`` has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkit.report.words import plain
from ntkit.studies.bell2023 import pictures, plane
from ntkit.studies.bell2023.found import Found, auroc, relative, removed
from ntkit.studies.bell2023.setting import Scale
from ntkit.studies.bell2023.unseen import HELD, KNOWN, SCORES, SETS
from ntkit.studies.judged import mean_error, told
from ntkit.studies.parts import Item, Part, axis, lines, table

Arrays = dict[str, np.ndarray]

METHODS = {
    "secant": "exact (secant)",
    "left": "start of each step",
    "ntk": "initial gradients",
}
KINDS = {"top": "top contributors", "near": "nearest images", "random": "random, same class"}


def sections(s: Scale, found: Found) -> tuple[list[Item], Arrays]:
    """All sections, and the arrays that they name."""
    arrays = {f"maps/{key}": value for key, value in found.maps.arrays.items()}
    made = [_plane(found)]
    for name, parts in found.images.items():
        arrays |= {f"images/{name}/{key}": parts[0].arrays[key] for key in ("network", *METHODS)}
        arrays |= {f"explained/{name}/{key}": value for key, value in found.explained[name].arrays.items()}
        made += [_images(s, name, found), _explained(s, name, found.explained[name])]
    made += [_removed(s, name, parts) for name, parts in found.removed.items()]
    made += [_unseen(s, name, parts) for name, parts in found.unseen.items()]
    return made, arrays


# ---------------------------------------------------------------------- the plane


def _plane(found: Found) -> Item:
    maps = found.maps.numbers

    def drawn(title: str, reading: str, *panels: tuple[str, str, str], **more: Any) -> Item:
        made = [{"heading": heading, "array": f"maps/{key}", "colours": colours} for heading, key, colours in panels]
        around = {"extent": [-plane.REACH, plane.REACH], "points": "maps/points", "labels": "maps/labels"}
        return {"kind": "maps", "title": title, "reading": reading, "panels": made} | around | more

    shares = drawn(
        "What one training point contributed to its class’s output",
        "The ringed point’s contribution everywhere in the plane: orange adds to the output, blue takes away.",
        *[(f"class {c + 1}", "contributions", "signed") for c in range(len(plane.CENTRES))],
    )
    for c, panel in enumerate(shares["panels"]):
        panel |= {"index": c, "ring": c}
    return {
        "title": "In the plane",
        "short": "Plane",
        "text": "Every rule rebuilds the logits of new points as initial output plus contributions of the training "
        "points; it errs by what it integrates wrongly along each step.",
        "items": [
            *(_rules(name, parts) for name, parts in found.plane.items()),
            drawn(
                "Regions: which output is largest",
                f"Network and kernel machine agree on {100 * maps['agree']:.2f} % of the map; with initial gradients "
                f"{100 * maps['agree_ntk']:.1f} %. ReLU, one seed.",
                ("the network", "network", "classes"),
                ("the kernel machine", "kernel", "classes"),
                ("with initial gradients", "ntk", "classes"),
            ),
            drawn(
                "How novel is a point, by the path kernel?",
                f"The deviation averages {maps['deviation_near']:.1f} near training points and "
                f"{maps['deviation_far']:.1f} far from them.",
                ("prior deviation, √k(x, x)", "norm", "ramp"),
                ("posterior deviation", "deviation", "ramp"),
                ("gradient outside the span, share", "outside", "ramp"),
            ),
            shares,
            _rule_table(found),
        ],
    }


def _rules(name: str, parts: list[Part]) -> Item:
    def mean(method: str) -> float:
        return mean_error(relative(parts, method))[0]

    kinds = (("left", "left end point", plane.LEFT), ("midpoint", "midpoint", plane.MIDPOINT))
    series = [
        {"name": words, "x": list(nodes), "y": [mean(f"{rule} {n}") for n in nodes]}
        for rule, words, nodes in (*kinds, ("gauss", "Gauss–Legendre", plane.GAUSS))
    ]
    ends = [1, max(plane.MIDPOINT)]
    series.append({"name": "secant (no nodes)", "x": ends, "y": [mean("secant")] * 2, "dash": "dash"})
    return lines(
        f"Error against nodes per step, {plane.LABELS[name]}",
        f"Mean over {len(parts)} seeds. Secant {plain(mean('secant'), 2)}, eight Gauss nodes "
        f"{plain(mean('gauss 8'), 2)}, 200 midpoints {plain(mean('midpoint 200'), 2)}, left end point "
        f"{plain(mean('left'), 2)}; initial gradients {plain(mean('ntk'), 2)}.",
        axis("nodes per step", "log"),
        axis("relative error", "log"),
        [{"heading": "", "series": series}],
    )


def _rule_table(found: Found) -> Item:
    rules = [("secant", "secant (exact)"), ("ntk", "initial gradients")]
    rules += [(f"left {n}", f"left end point, {n}") for n in plane.LEFT]
    rules += [(f"midpoint {n}", f"midpoint, {n}") for n in (1, 10, 100, 200)]
    rules += [(f"gauss {n}", f"Gauss–Legendre, {n}") for n in plane.GAUSS]

    def absolute(part: Part, rule: str) -> str:
        return plain(part.numbers["errors"][rule]["largest"], 2)

    rows = [
        [words, *(plain(mean_error(relative(p, rule))[0], 2) for p in found.plane.values()),
         *(absolute(p[0], rule) for p in found.plane.values())]
        for rule, words in rules
    ]  # fmt: skip
    labels = [plane.LABELS[name] for name in found.plane]
    return table(
        "Error of the rebuilt logits, by rule and nodes per step",
        ["Rule, nodes", *(f"relative, {label}" for label in labels), *(f"absolute, {label}" for label in labels)],
        rows,
        "Relative to the largest logit: mean over seeds. Absolute: the first seed. With many nodes it is the error of "
        "Jacobian–vector products along each step, which the contributions sum to; where both were computed they agree "
        f"to {plain(max(part.numbers['apart'] for parts in found.plane.values() for part in parts), 2)}.",
        folded=True,
    )


# ---------------------------------------------------------------------- images


def _images(s: Scale, name: str, found: Found) -> Item:
    parts, nodes = found.images[name], found.nodes[name].numbers["errors"]
    errors = {method: relative(parts, method) for method in METHODS}
    away = max(abs(part.numbers["errors"]["secant"]["slope"] - 1) for part in parts)
    scatter = {
        "kind": "scatter",
        "title": "Kernel prediction against network logit",
        "reading": f"{s.test} test images, ten outputs each, one seed; the line is the diagonal. Largest error: "
        f"{plain(max(errors['secant']), 2)} of the largest logit (slope − 1: {plain(away, 2)}), with gradients at the "
        f"start of each step {told(errors['left'], 3)}, with initial ones {told(errors['ntk'])}.",
        "x": "network logit",
        "y": "kernel prediction",
        "panels": [
            {"heading": words, "x": f"images/{name}/network", "y": f"images/{name}/{method}"}
            for method, words in METHODS.items()
        ],
    }
    curves = [
        {"name": words, "x": list(s.nodes), "y": [nodes[f"{rule} {n}"]["relative"] for n in s.nodes]}
        for rule, words in (("left", "left end points"), ("midpoint", "midpoints"))
    ]
    curves.append({"name": "secant (no nodes)", "x": [1, s.nodes[-1]], "y": [errors["secant"][0]] * 2, "dash": "dash"})
    shown = [n for n in s.nodes if n in (1, 10, s.nodes[-1])]
    against = lines(
        "Error against integration points per step",
        f"{min(s.probed, s.test)} test images, one seed. With {', '.join(map(str, shown))} left end points: "
        f"{', '.join(plain(nodes[f'left {n}']['relative'], 2) for n in shown)} of the largest logit; midpoints: "
        f"{', '.join(plain(nodes[f'midpoint {n}']['relative'], 2) for n in shown)}.",
        axis("points per step", "log"),
        axis("relative error", "log"),
        [{"heading": "", "series": curves}],
        wide=True,
    )
    return {
        "title": f"Images: {name}",
        "short": name.capitalize(),
        "text": f"A convolutional ReLU network with {parts[0].numbers['parameters']:,} parameters, {s.train:,} images, "
        f"{s.steps} steps of full-batch gradient descent; test accuracy "
        f"{told([part.numbers['accuracy'] for part in parts])}.",
        "items": [scatter, against, *([_recipes(s, found)] if name == "digits" else [])],
    }


def _recipes(s: Scale, found: Found) -> Item:
    rows = []
    for name, parts in found.recipes.items():
        of = {key: [part.numbers[key] for part in parts] for key in parts[0].numbers}
        exact = [plain(max(of[f"secant {kind}"]), 2) for kind in ("float64", "float32")]
        others = [told(of[f"{method} float64"], 3) for method in ("left", "ntk")]
        rows.append([pictures.RECIPES[name].title, *exact, *others, told(of["accuracy"])])
    return table(
        "Optimisers of today: error of the rebuilt logits, relative to the largest",
        ["Optimiser", "Exact, float64", "Exact, float32", "Start of each step", "Initial gradients", "Test accuracy"],
        rows,
        f"{s.other_steps} steps on minibatches of {pictures.BATCH}; {pictures.OTHER_TEST} test images; where exact, "
        "the largest over seeds.",
    )


# ---------------------------------------------------------------------- what predictions are made of


def _explained(s: Scale, name: str, part: Part) -> Item:
    shown = part.numbers["cases"]
    called = [f"predicted {case['predicted']}, is a {case['label']}" for case in shown]
    panels = []
    for case, heading in zip(shown, called, strict=True):
        over = case["over_time"]
        series = [
            {"name": words, "x": list(range(len(over[key]))), "y": over[key]}
            for key, words in (("own", "examples of the predicted class"), ("others", "all other examples"))
        ]
        series.append({"name": "the output", "x": series[0]["x"], "y": over["logit"], "dash": "dash"})
        panels.append({"heading": heading, "series": series})
    rows = [
        [heading, f"{case['initial']:.2f}", *(f"{v:+.1f}" for v in case["classes"]), f"{case['logit']:.2f}"]
        for case, heading in zip(shown, called, strict=True)
    ]
    classes = [f"of {c}" for c in range(len(shown[0]["classes"]))]
    return {
        "title": f"What predictions are made of: {name}",
        "short": "Contributions" if name == "digits" else f"Contributions, {name}",
        "text": "The predicted output of four test images, from the worst margin to the best, as a sum over the "
        f"training images; it meets the network’s own to {plain(part.numbers['error'], 2)} of the largest.",
        "items": [
            {"kind": "images", "title": "Training images for and against", "cases": [
                _case(name, i, case, s.train) for i, case in enumerate(shown)
            ]},
            lines(
                "The predicted output, made up step by step",
                "Examples of the predicted class push its output up, all others down: the output is the small "
                "difference of large sums.",
                axis("step"), axis("sum of contributions"), panels, wide=True,
            ),
            table("Contributions to the predicted output, by class of the training images",
                  ["Test image", "Initial", *classes, "Output"], rows),
        ],
    }  # fmt: skip


def _case(name: str, i: int, case: Item, n: int) -> Item:
    right = "rightly" if case["predicted"] == case["label"] else f"wrongly: it is a {case['label']}"
    strips = []
    for side, heading in (("for", "spoke most for it"), ("against", "spoke most against it")):
        images = [
            {"image": [f"explained/{name}/{side}", [i, j]], "caption": str(label), "value": f"{value:+.2f}",
             "other": side == "for" and label != case["predicted"]}
            for j, (label, value) in enumerate(zip(case[side]["labels"], case[side]["values"], strict=True))
        ]  # fmt: skip
        strips.append({"heading": heading, "images": images})
    return {
        "image": [f"explained/{name}/test", [i]],
        "text": f"Predicted {case['predicted']}, {right}. Output {case['logit']:.2f} = {case['initial']:.2f} at the "
        f"start {case['logit'] - case['initial']:+.2f} by training; {case['half']} of {n:,} examples carry half of "
        "all contributions.",
        "strips": strips,
    }


# ---------------------------------------------------------------------- removal, images of other kinds


def _removed(s: Scale, name: str, parts: list[Part]) -> Item:
    rows, series = [], []
    for kind, words in KINDS.items():
        falls = [[-v for v in removed(parts, share, kind, "margin")] for share in s.shares]
        found = [mean_error(fall) for fall in falls]
        x = [100 * share for share in s.shares]
        series.append({"name": words, "x": x, "y": [m for m, _ in found], "error": [e for _, e in found]})
        for share, fall in zip(s.shares, falls, strict=True):
            logit, flipped = (removed(parts, share, kind, what) for what in ("logit", "flipped"))
            share_flipped = f"{100 * mean_error(flipped)[0]:.0f} %"
            rows.append([f"{words}, {100 * share:g} %", told(fall), told([-v for v in logit]), share_flipped])
    every = [r for part in parts for r in part.numbers["removed"]]
    own = np.mean([r["same_class"] for r in every if r["kind"] == "top"])
    correlation = np.corrcoef([r["told"] for r in every], [r["logit"] for r in every])[0, 1]
    dots = [
        {"name": words, **{axis: [r[what] for r in every if r["kind"] == kind]
                           for axis, what in (("x", "told"), ("y", "logit"))}}
        for kind, words in KINDS.items()
    ]  # fmt: skip
    return {
        "title": f"Are contributions faithful? {name.capitalize()}",
        "short": "Faithfulness" if name == "digits" else f"Faithfulness, {name}",
        "text": f"For {len(parts)} test images some training examples are taken away, and the network is trained again "
        f"from the same start with the same batches. {100 * own:.0f} % of the top contributors are of the predicted "
        "class.",
        "items": [
            lines(
                "How much the margin falls without some examples",
                f"Predicted output minus the next. With {100 * s.shares[-1]:g} % removed: "
                + ", ".join(f"{row[0].rsplit(',', 1)[0]} {row[1]}" for row in rows[len(s.shares) - 1 :: len(s.shares)])
                + ".",
                axis("% of the training set removed"), axis("fall of the margin"),
                [{"heading": "", "series": series}],
            ),
            lines(
                "Change foretold and true",
                f"Each removal a dot; correlation {correlation:.2f}. The true change is far "
                "smaller: the examples that are left make up for most of it.",
                axis("− sum of the contributions removed"), axis("change of the predicted output"),
                [{"heading": "", "series": dots}], style="dots",
            ),
            table("Without some examples", ["Removed", "Margin falls by", "Output falls by", "Another class predicted"],
                  rows),
        ],
    }  # fmt: skip


def _unseen(s: Scale, name: str, parts: list[Part]) -> Item:
    rows = [
        [title, "kernel" if of_kernel else "baseline", *(told(auroc(parts, kind, score), 3) for kind in SETS)]
        for score, (title, of_kernel) in SCORES.items()
    ]
    kernels = [found for part in parts for found in part.numbers["certificates"].values()]
    rank = min(part.numbers["certificates"]["path"]["rank"] for part in parts)
    return {
        "title": f"Images of other kinds: {name}",
        "short": "Other kinds" if name == "digits" else f"Other kinds, {name}",
        "text": f"A network learns {KNOWN[0]} to {KNOWN[-1]} ({s.train:,} images, {s.unseen_steps} steps). Which of "
        f"{s.unseen} new images of these, {s.unseen} of {HELD[0]} to {HELD[-1]}, and {s.unseen} patches of two "
        "photographs are of a kind it did not learn? Scores from gradients (ntkit.novelty) beside baselines.",
        "items": [
            table(
                "Area under the ROC curve (0.5 is chance)",
                ["Score", "Kind", *SETS.values()],
                rows,
                f"Mean over {len(parts)} seeds (start, training images). The training gradients of the path kernel "
                f"span {rank} dimensions of {s.train} examples. Solves certified to "
                f"{plain(max(f['residual'] for f in kernels), 2)}, zero of the span scores to "
                f"{plain(max(f['floor'] for f in kernels), 2)}.",
            )
        ],
    }

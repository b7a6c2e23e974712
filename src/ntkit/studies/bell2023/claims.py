"""What the paper and its follow-ups claim, judged by what was found."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkit.report.words import plain
from ntkit.studies.bell2023.found import Found, auroc, relative, removed
from ntkit.studies.bell2023.plane import LABELS
from ntkit.studies.bell2023.setting import Scale, order
from ntkit.studies.bell2023.unseen import SCORES, SETS
from ntkit.studies.judged import claimed, mean_error, told
from ntkit.studies.parts import Part

EXACT, SINGLE, AGREES, ORDERS = 1e-12, 1e-5, 1e-3, 100
SMOOTH = (5, 10, 20, 50, 100)  # nodes over which orders are fitted: beyond the first, before rounding

Claim = dict[str, Any]


def judge(s: Scale, found: Found) -> list[Claim]:
    """All claims, in the order of the experiments."""
    return [
        *_exactness(found),
        *_integrals(found),
        *_plane(found),
        *(claim for name, part in found.nodes.items() for claim in _many_nodes(s, name, part)),
        *(claim for name, parts in found.removed.items() for claim in _faithful(s, name, parts)),
        *(claim for name, parts in found.unseen.items() for claim in _unseen(name, parts)),
    ]


def _exactness(found: Found) -> list[Claim]:
    of = {f"three clusters, {LABELS[name]}": relative(parts, "secant") for name, parts in found.plane.items()}
    of |= {name: relative(parts, "secant") for name, parts in found.images.items()}
    double, single = (
        max(part.numbers[f"secant {kind}"] for parts in found.recipes.values() for part in parts)
        for kind in ("float64", "float32")
    )
    claims = [
        claimed(
            "A network trained by gradient descent is a kernel machine, to machine precision",
            "largest relative residual: " + ", ".join(f"{name} {plain(max(v), 2)}" for name, v in of.items()),
            all(max(v) <= EXACT for v in of.values()),
            f"float64, secant form, every seed; relative to the largest logit; holds at {EXACT:g} or less",
        )
    ]
    for name, parts in found.images.items():
        slopes = {m: [part.numbers["errors"][m]["slope"] for part in parts] for m in ("secant", "left", "ntk")}
        away = max(abs(v - 1) for v in slopes["secant"])
        claims.append(
            claimed(
                f"Kernel prediction against network logit lies on the diagonal, {name}",
                f"slope − 1: {plain(away, 2)} (exact); slope {told(slopes['left'], 3)} with gradients at the start of "
                f"each step, {told(slopes['ntk'], 3)} with those at initialisation",
                away <= EXACT,
                f"least squares over all logits of all test images; holds within {EXACT:g} of 1",
            )
        )
    return [
        *claims,
        claimed(
            "The same for momentum, weight decay, Adam, schedules, clipping and minibatches",
            f"largest relative residual: {plain(double, 2)} (float64)",
            double <= EXACT,
            f"not in the paper; {len(found.recipes)} optimisers, every seed; holds at {EXACT:g} or less",
        ),
        claimed(
            "In single precision the residual is rounding, too",
            f"largest relative residual: {plain(single, 2)} (float32)",
            single <= SINGLE,
            f"the same optimisers; holds at {SINGLE:g} or less",
        ),
    ]


def _integrals(found: Found) -> list[Claim]:
    orders = {
        (name, rule): [order(nodes, [_error(part, f"{rule} {n}") for n in nodes]) for part in parts]
        for name, parts in found.plane.items()
        for rule, nodes in (("midpoint", SMOOTH), ("left", (10, 100)))
    }
    gauss = {name: max(relative(parts, "gauss 8")) for name, parts in found.plane.items()}
    left, midpoint = orders["tanh", "left"], orders["tanh", "midpoint"]
    return [
        claimed(
            "Smooth networks: the left end point errs with 1 / T, the midpoint with 1 / T²",
            f"orders {told(left)} and {told(midpoint)} (tanh); {told(orders['relu', 'left'])} and "
            f"{told(orders['relu', 'midpoint'])} (ReLU)",
            all(abs(v - 1) < 0.2 for v in left) and all(abs(v - 2) < 0.2 for v in midpoint),
            "fitted over 10 to 100 and 5 to 100 nodes a step; holds within 0.2 of 1 and 2, for tanh",
        ),
        claimed(
            "Smooth networks: eight Gauss–Legendre nodes give machine precision",
            f"largest relative error {plain(gauss['tanh'], 2)} (tanh)",
            gauss["tanh"] <= EXACT,
            f"holds at {EXACT:g} or less",
        ),
        claimed(
            "Kinks destroy high orders",
            f"eight Gauss–Legendre nodes: largest relative error {plain(gauss['relu'], 2)} (ReLU)",
            gauss["relu"] > 1e-6,
            "holds if over 1e-6. The secant form has no nodes and is exact for both",
        ),
        _apart(found),
    ]


def _error(part: Part, method: str) -> float:
    return part.numbers["errors"][method]["relative"]


def _apart(found: Found) -> Claim:
    """Left end points and initial gradients against the integral."""
    ratios, said = [], []
    for name, parts in {**found.plane, **found.images}.items():
        best = [found.nodes[name].numbers["errors"]] if name in found.nodes else [p.numbers["errors"] for p in parts]
        fine = max(errors["midpoint 200"]["relative"] for errors in best) if "midpoint 200" in best[0] else None
        left, ntk = relative(parts, "left"), relative(parts, "ntk")
        said.append(
            f"{LABELS.get(name, name)}: {told(left, 3)} and {told(ntk, 2)}"
            + (f" (200 nodes: {plain(fine, 2)})" if fine else "")
        )
        ratios += [min(min(left), min(ntk)) / fine] if fine else []
    return claimed(
        "Gradients at the start of each step, or at initialisation, err by orders of magnitude more",
        "relative error, " + "; ".join(said),
        all(r > ORDERS for r in ratios) if ratios else None,
        f"start of each step: the discretised path kernel; initialisation: the tangent kernel. Holds if every one is "
        f"over {ORDERS} times the largest error of the integral with 200 midpoints",
    )


def _plane(found: Found) -> list[Claim]:
    maps = found.maps.numbers
    return [
        claimed(
            "The kernel machine draws the network’s own regions in the plane",
            f"{100 * maps['agree']:.2f} % of the map agree; with gradients at initialisation "
            f"{100 * maps['agree_ntk']:.1f} %",
            maps["agree"] == 1,
            "largest output at each pixel; holds if all agree",
        ),
        claimed(
            "The path kernel is a kernel: symmetric, positive semidefinite",
            f"least eigenvalue over largest: {plain(maps['least_eigenvalue'], 2)}",
            maps["least_eigenvalue"] >= -1e-10,
            "trace kernel on the training points; holds if not below −1e-10",
        ),
        claimed(
            "Its posterior is uncertain far from the data",
            f"deviation {maps['deviation_near']:.1f} within {0.5} of a training point, {maps['deviation_far']:.1f} "
            f"beyond {1.5}; rank correlation with the distance {maps['rank_correlation']:.2f}",
            maps["rank_correlation"] > 0.5,
            "holds if the rank correlation is over 0.5",
        ),
    ]


def _many_nodes(s: Scale, name: str, part: Part) -> list[Claim]:
    claims = []
    few, many = [n for n in s.nodes if n in (1, 10)], s.nodes[-1]
    for rule, words in (("left", "left end points"), ("midpoint", "midpoints")):
        values = {n: part.numbers["errors"][f"{rule} {n}"]["relative"] for n in (*few, many)}
        claims.append(
            claimed(
                f"On images only many integration points agree: {words}, {name}",
                "relative error " + ", ".join(f"{plain(v, 2)} with {n}" for n, v in values.items()),
                all(values[n] > AGREES for n in few) and values[many] <= AGREES,
                f"{min(s.probed, s.test)} test images; holds if {' and '.join(map(str, few))} a step err by over "
                f"{AGREES:g} of the largest logit, and {many} by less",
            )
        )
    return claims


def _gap(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _faithful(s: Scale, name: str, parts: list[Part]) -> list[Claim]:
    claims = []
    for against, words in (("random", "random examples of the same class"), ("near", "its nearest images in pixels")):
        gaps = {
            share: _gap(removed(parts, share, against, "margin"), removed(parts, share, "top", "margin"))
            for share in s.shares
        }
        claims.append(
            claimed(
                f"Without its top contributors a prediction changes more than without {words}, {name}",
                "fall of the margin less the other’s: "
                + ", ".join(f"{told(g)} ({100 * share:g} % removed)" for share, g in gaps.items()),
                all(mean_error(g)[0] > 2 * mean_error(g)[1] for g in gaps.values()),
                f"trained again from the same start with the same batches; {len(parts)} test images"
                + (f", {s.draws} draws each" if against == "random" else "")
                + "; holds if more by two standard errors for each share",
            )
        )
    every = [r for part in parts for r in part.numbers["removed"]]
    expected, true = (np.array([r[what] for r in every]) for what in ("told", "logit"))
    return [
        *claims,
        claimed(
            f"The sum of contributions removed foretells the change, {name}",
            f"correlation {np.corrcoef(expected, true)[0, 1]:.2f} over {len(every)} removals; true change over sum: "
            f"{float(expected @ true / (expected @ expected)):.3f}",
            None,
            "the paper does not say it. The network that is trained again makes up for most of what was removed: "
            "contributions say what was learned from an example, not what would be lacking without it",
        ),
    ]


def _unseen(name: str, parts: list[Part]) -> list[Claim]:
    own = [score for score, (_, of_kernel) in SCORES.items() if of_kernel]
    baselines = [score for score in SCORES if score not in own]

    def best(kind: str, scores: list[str]) -> str:
        return max(scores, key=lambda score: mean_error(auroc(parts, kind, score))[0])

    span = {kind: auroc(parts, kind, "path outside") for kind in SETS}
    claims = [
        claimed(
            f"Gradients of images of other kinds leave the span of the training gradients, {name}",
            "; ".join(f"AUROC {told(v, 3)}, {SETS[kind]}" for kind, v in span.items()),
            all(mean_error(v)[0] - 2 * mean_error(v)[1] > 0.5 for v in span.values()),
            "path kernel, share of the gradient outside the span; holds if over 0.5 by two standard errors for both",
        )
    ]
    for rivals, words in ((["softmax", "energy"], "softmax and energy"), (baselines, "every baseline")):
        pairs = {kind: (best(kind, own), best(kind, rivals)) for kind in SETS}
        gaps = {kind: _gap(auroc(parts, kind, a), auroc(parts, kind, b)) for kind, (a, b) in pairs.items()}
        claims.append(
            claimed(
                f"The best kernel score tells them better than {words}, {name}",
                "; ".join(
                    f"{SETS[kind]}: {told(auroc(parts, kind, a), 3)} ({SCORES[a][0]}) against "
                    f"{told(auroc(parts, kind, b), 3)} ({SCORES[b][0]})"
                    for kind, (a, b) in pairs.items()
                ),
                all(mean_error(g)[0] > 2 * mean_error(g)[1] for g in gaps.values()),
                "best of six kernel scores, chosen after the fact, against the best of these; holds if more by two "
                "standard errors for both kinds",
            )
        )
    return claims

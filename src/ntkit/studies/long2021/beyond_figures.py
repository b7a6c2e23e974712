"""Sections on what the paper did not ask; each takes what is finished, and the first one says what is not there yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from ntkit.studies.claim import Estimate
from ntkit.studies.long2021 import beyond
from ntkit.studies.long2021.beyond import added_runs, main_runs
from ntkit.studies.long2021.by_layer import END
from ntkit.studies.long2021.evidence import common_seeds, estimate, main_settings, mean_of, measured, number
from ntkit.studies.long2021.figures import MACHINES, cosine_lines, error_lines, kernel_table, loss_curve
from ntkit.studies.long2021.long_setting import START, TEN, Setting, extent
from ntkit.studies.long2021.sentences import shown
from ntkit.studies.part import Result
from ntkit.studies.study import Item, Results, Section, curve, lines, table

ALONG = {"test_error": "SVM, kernel at this step", "network_error": "network at this step"}
ALIKE = {"agreement": "same class", "correlation": "correlation", "alignment": "alignment with the labels"}
CLASS_MACHINES = {
    "test_error": "network",
    "tangent.test_error": "SVMs, one class against the rest",
    "tangent.ridge_error": "ridge regression",
}


def sections(results: Results) -> Iterator[Section]:
    """What is there, layers, the time along training, agreement, ten classes, other networks."""
    yield _state_section(results)
    mains = list(dict.fromkeys(setting for setting, _ in main_runs(results.work)))
    layered = [s for s in mains if measured(results, s, START, "layers")]
    if layered:
        yield _layers_section(results, layered)
    followed = [s for s in mains if results["along"].get(s)]
    if followed:
        yield _along_section(results, followed)
    if any(True for _ in main_settings(results)):
        yield _agreement_section(results, layered)
    added = dict.fromkeys(setting for setting, _ in added_runs(results.work))
    by_pair: dict[str, list[Setting]] = {}
    for setting in added:
        if measured(results, setting, START):
            by_pair.setdefault(setting.pair, []).append(setting)
    for pair, chosen in by_pair.items():
        yield _classes_section(results, pair, chosen) if pair in TEN else _networks_section(results, pair, chosen)


def _state_section(results: Results) -> Section:
    """How many parts of each experiment are there."""
    there: Counter[str] = Counter()
    listed: Counter[str] = Counter()
    for part in beyond.parts(results.work):
        setting = part.arguments[0]
        kind = {"layers": "Layers", "along": "Along training"}.get(part.experiment, "Training and kernels")
        name = f"{kind}: {setting.pair}, {setting.network}"
        listed[name] += 1
        there[name] += results.work.finished(part)
    missing = [[name, str(there[name]), str(count)] for name, count in listed.items() if there[name] < count]
    text = (
        "The sections below are not in the paper: each layer’s share of the kernel, the kernel along training, whether "
        "machine and network decide alike, ten classes, residual networks and transformers. "
        + (f"{there.total()} of {listed.total()} parts are there." if missing else "All parts are there.")
    )
    items = [table("Not there yet", ["Experiment", "Parts there", "Parts"], missing)] if missing else []
    return Section("What the paper did not ask", "Beyond the paper", text, items)


# ---------------------------------------------------------------------- layers


def _layers_section(results: Results, chosen: Sequence[Setting]) -> Section:
    sizes = extent(results.work)
    text = (
        "The kernel is a sum of one share for each layer (its weight and its bias). A machine is made with each share "
        "alone, and with the kernel without it, before training and at the end of training; on "
        f"{sizes.kernel_train:,} of the training images and {sizes.kernel_test:,} test images at most. The share of "
        "the last layer is the conjugate kernel, plus one. Where a share does not separate the classes, its machine "
        "is ridge regression."
    )
    alone, without = (
        [(f"{s.pair}, {s.network}", _layer_curves(results, s, kind)) for s in chosen] for kind in ("alone", "without")
    )
    shares = [(f"{s.pair}, {s.network}", _share_curves(results, s)) for s in chosen]
    items = [
        lines(
            "What each layer’s share classifies alone",
            "Dashed: before training. A layer whose share alone is as good as the whole kernel carries it.",
            "layer, counted from the input", "test error of the SVM, %", alone, wide=True,
        ),
        lines(
            "What is left without a layer",
            "Dashed: before training. The kernel needs a layer when leaving its share out costs accuracy.",
            "layer, counted from the input", "test error of the SVM, %", without, wide=True,
        ),
        lines(
            "Each layer’s share of the trace",
            "How much of the squared length of the gradients lies in each layer.",
            "layer, counted from the input", "share of the trace", shares, wide=True,
        ),
        _layers_table(results, chosen),
    ]  # fmt: skip
    return Section("Which layers carry the gain", "Layers", text, items)


def _layer_curves(results: Results, setting: Setting, kind: str) -> list[Item]:
    words = {"alone": "this layer alone", "without": "without this layer", "whole": "all layers"}
    curves = []
    for which in (kind, "whole"):
        for moment, when, dash in ((START, ", before training", "dash"), (END, "", "solid")):
            values = [
                (place + 1, value)
                for place, value in enumerate(_layer_errors(results, setting, moment, which))
                if not math.isnan(value.value)
            ]
            if values:
                curves.append(_of(words[which] + when, [x for x, _ in values], [v for _, v in values], 100, dash))
    return curves


def _layer_errors(results: Results, setting: Setting, moment: str, kind: str) -> list[Estimate]:
    """The machine's test error by layer; of the whole kernel the same number for each."""
    runs = measured(results, setting, moment, "layers")
    count = max((len(run.numbers["layers"]) for run in runs.values()), default=0)
    paths = ["whole.test_error" if kind == "whole" else f"layers.{i}.{kind}.test_error" for i in range(count)]
    return [_of_both(results, setting, moment, path) for path in paths]


def _share_curves(results: Results, setting: Setting) -> list[Item]:
    curves = []
    for moment, name, dash in ((START, "before training", "dash"), (END, "at the end", "solid")):
        count = len(_layer_errors(results, setting, moment, "alone"))
        values = [estimate(results, setting, moment, f"layers.{i}.share", "layers") for i in range(count)]
        if values:
            curves.append(_of(name, range(1, count + 1), values, 1, dash))
    return curves


def _layers_table(results: Results, chosen: Sequence[Setting]) -> Item:
    rows = []
    for setting in chosen:
        runs = [measured(results, setting, moment, "layers") for moment in (START, END)]
        kinds = next(iter(runs[0].values())).numbers["kinds"]
        for i, kind in enumerate(["", *kinds]):
            own = f"layers.{i - 1}."
            paths = [f"{own}share", f"{own}alone.test_error", f"{own}without.test_error"]
            texts = [_both(results, setting, path) for path in paths] if i else ["1", _both(results, setting), ""]
            rows.append([f"{setting.pair}, {setting.network}", f"{i}: {kind}" if i else "all layers", *texts])
    columns = ["Setting", "Layer", "Share of the trace", "Error of its share alone", "Error without it"]
    note = "In each cell: before training → at the end of training; ± is one standard error over seeds."
    return table("Layers", columns, rows, note, folded=True)


def _both(results: Results, setting: Setting, path: str = "whole.test_error") -> str:
    """A number of the layers before training and at the end."""
    values = (_of_both(results, setting, moment, path) for moment in (START, END))
    return " → ".join("–" if math.isnan(value.value) else shown(value, ".4f") for value in values)


def _of_both(results: Results, setting: Setting, moment: str, path: str) -> Estimate:
    """A number of the layers, of the seeds that have it at both moments, as far as both are computed."""
    there = [(setting, when) for when in (START, END) if measured(results, setting, when, "layers")]
    seeds = common_seeds(results, *there, paths=[path], experiment="layers") if there else set()
    return estimate(results, setting, moment, path, "layers", seeds)


def _of(name: str, x: Sequence[float], values: Sequence[Estimate], scale: float, dash: str = "solid") -> Item:
    errors = [0.0 if math.isnan(v.error) else scale * v.error for v in values]
    return curve(name, x, [scale * v.value for v in values], error=errors, dash=dash)


# ---------------------------------------------------------------------- along training


def _along_section(results: Results, chosen: Sequence[Setting]) -> Section:
    sizes = extent(results.work)
    text = (
        "Machines with the kernel of one recorded step after the other, each step at least "
        f"{sizes.ratio:g} times the one before, on {sizes.kernel_train:,} of the training images and "
        f"{sizes.kernel_test:,} test images at most; the network is trained on all of them. Mean over seeds, at the "
        "steps that all of them reached and where the number is defined for all."
    )
    errors = [(f"{s.pair}, {s.network}", _along_curves(results, s, ALONG, "epochs", 100)) for s in chosen]
    machine = {"test_error": ALONG["test_error"]}
    alone = [(f"{s.pair}, {s.network}", _along_curves(results, s, machine, "epochs", 100)) for s in chosen]
    by_loss = [(f"{s.pair}, {s.network}", _along_curves(results, s, ALONG, "loss", 100)) for s in chosen]
    alike = [(f"{s.pair}, {s.network}", _along_curves(results, s, ALIKE, "epochs", 1)) for s in chosen]
    items = [
        lines(
            "Test error along training", "Dashed: the machine before training.",
            "epochs", "test error, %", errors, log="xy", wide=True,
        ),
        lines(
            "Test error along training, the machine alone", "As above, without the network.",
            "epochs", "test error, %", alone, log="xy", wide=True,
        ),
        lines(
            "Test error against the training loss of the same step", "Training goes from right to left.",
            "training loss", "test error, %", by_loss, log="xy", wide=True,
        ),
        lines(
            "Machine and network, kernel and labels along training",
            "Same class: part of the test images on which machine and network agree. Correlation: of the machine’s "
            "decision with the network’s output.",
            "epochs", "", alike, log="xy", wide=True,
        ),
    ]  # fmt: skip
    for item in items:
        item["y"]["scale"] = "linear"  # an error may be zero
    return Section("When along training the kernel becomes good", "Along training", text, items)


def _along_curves(results: Results, setting: Setting, names: dict[str, str], x: str, scale: float) -> list[Item]:
    """Means over the seeds that have a step, without steps that fewer seeds reached; against epochs or loss."""
    by_step: dict[int, list[dict[str, float]]] = {}
    runs = results["along"][setting]
    for run in runs:
        for row in run.numbers["steps"]:
            by_step.setdefault(row["step"], []).append(row)
    steps = [step for step, rows in sorted(by_step.items()) if len(rows) == len(runs) and (step or x == "loss")]
    curves = []
    for key, name in names.items():
        values = [_row_mean(by_step[step], key) for step in steps]
        places = [_row_mean(by_step[step], x).value for step in steps]
        kept = [i for i, value in enumerate(values) if not math.isnan(value.value)]
        curves.append(_of(name, [places[i] for i in kept], [values[i] for i in kept], scale))
    if x == "epochs" and "test_error" in names and steps:
        start = _row_mean(by_step[0], "test_error")
        if not math.isnan(start.value):
            ends = [_row_mean(by_step[step], x).value for step in (steps[0], steps[-1])]
            curves.append(_of("SVM, kernel before training", ends, [start, start], scale, "dash"))
    return curves


def _row_mean(rows: Sequence[dict[str, float]], key: str) -> Estimate:
    """Mean over all seeds; undefined where it is for one of them: two places of a curve are of the same seeds."""
    return Estimate(math.nan) if any(row[key] is None for row in rows) else mean_of([row[key] for row in rows])


# ---------------------------------------------------------------------- agreement


def _agreement_section(results: Results, layered: Sequence[Setting]) -> Section:
    """Whether machine and network decide alike, image by image."""
    items = []
    for key, title, words in (
        ("agreement", "Test images that machine and network put in the same class", "part of the test images"),
        ("correlation", "Correlation of the machine’s decision with the network’s output", "correlation"),
    ):
        panels = [
            (
                f"{s.pair}, {s.network}",
                [loss_curve(results, s, f"{k}.{key}", f"SVM, {k} kernel") for k in ("tangent", "conjugate")],
            )
            for s in main_settings(results)
        ]
        reading = "The machine has the network’s kernel of the same moment. Training goes from right to left."
        items.append(lines(title, reading, "training loss", words, panels, log="x", wide=True))
    panels, arrays = [], {}
    for setting in layered:
        run = next(iter(measured(results, setting, END, "layers").values()), None)
        if run is not None:
            names = [f"agreement/{setting.file(run.numbers['seed'])}/{kind}" for kind in ("logit", "decision")]
            arrays |= dict(zip(names, _standardized(run), strict=True))
            heading = f"{setting.pair}, {setting.network}, loss {number(run, 'loss'):.2g}"
            panels.append({"heading": heading, "x": names[0], "y": names[1]})
    if panels:
        items.append({
            "kind": "scatter", "title": "Each test image: the machine’s decision against the network’s output",
            "reading": "Both over their root mean square. The first seed, at the end of training; the machine has "
            f"{extent(results.work).kernel_train:,} of the training images at most.",
            "x": "network’s output", "y": "decision of the SVM", "panels": panels,
        })  # fmt: skip
    return Section(
        "Does the machine decide as the network?", "Agreement",
        "The kernel is the network’s, but the machine is fitted to the labels, not to the network: nothing forces the "
        "two to agree.", items, arrays,
    )  # fmt: skip


def _standardized(run: Result) -> list[np.ndarray]:
    """The network's outputs and the machine's decisions on test images, each over its root mean square."""
    arrays = (run.arrays[name].astype(float) for name in ("logit", "decision"))
    return [(a / max(float(np.sqrt((a**2).mean())), np.finfo(float).tiny)).astype(np.float32) for a in arrays]


# ---------------------------------------------------------------------- ten classes, other networks


def _sampled(results: Results, chosen: Sequence[Setting]) -> str:
    sizes = extent(results.work)
    runs = [(s, len(measured(results, s, START))) for s in chosen]
    counts = "; ".join(f"{s.network} {s.lr:g}, {n} seed{'s' * (n > 1)}" for s, n in runs)
    return (
        f"Network and machines learn from the same images: {sizes.train:,} for training and {sizes.test:,} for testing "
        f"at most, as many of each class. Plain SGD; learning rates: {counts}; ± is one standard error over seeds."
    )


def _networks_section(results: Results, pair: str, chosen: Sequence[Setting]) -> Section:
    """A residual network and a transformer on two classes."""
    text = (
        "A residual network (two blocks, ReLU, no normalization) and a vision transformer (three blocks, LayerNorm, "
        f"GELU) of about 100,000 parameters, which are not in the paper. {_sampled(results, chosen)}"
    )
    items = [error_lines(results, chosen, MACHINES)]
    items += [cosine_lines(results, chosen, form) for form in ("raw", "centered")]
    return Section(f"Other networks: {pair}", f"Other networks, {pair}", text, [*items, kernel_table(results, chosen)])


def _classes_section(results: Results, pair: str, chosen: Sequence[Setting]) -> Section:
    """Ten classes at once."""
    text = (
        "Cross-entropy, ten outputs; the kernel is summed over outputs. Hard-margin SVMs separate each class from the "
        "rest, the largest decision wins; ridge regression has one-hot targets and the ridge of least leave-one-out "
        f"error. {_sampled(results, chosen)}"
    )
    columns = {
        "Loss": ("loss", 3), "Network error": ("test_error", 4), "SVM error": ("tangent.test_error", 4),
        "Ridge error": ("tangent.ridge_error", 4), "Alignment": ("tangent.alignment", 3),
        "Alignment, centered": ("tangent.alignment_centered", 3), "Effective rank": ("tangent.effective_rank", 2),
        "Agreement": ("tangent.agreement", 4),
    }  # fmt: skip
    items = [error_lines(results, chosen, CLASS_MACHINES)]
    items += [cosine_lines(results, chosen, form) for form in ("raw", "centered")]
    return Section(pair, pair, text, [*items, kernel_table(results, chosen, columns)])

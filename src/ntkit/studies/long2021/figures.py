"""Figures and tables: errors and cosines against the training loss, learning rates, augmentation, example images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ntkit.probes import standard
from ntkit.report.words import fixed
from ntkit.studies.claim import Estimate
from ntkit.studies.long2021.evidence import (
    INVARIANT,
    SWAP,
    common_seeds,
    estimate,
    main_settings,
    measured,
    probes,
)
from ntkit.studies.long2021.long_setting import PAIRS, START, Setting, images
from ntkit.studies.part import Result, StudyPart, Work
from ntkit.studies.study import Item, Results, Section, curve, lines, table

MACHINES = {
    "test_error": "network",
    "tangent.test_error": "SVM, tangent kernel",
    "conjugate.test_error": "SVM, conjugate kernel",
    "tangent centered.test_error": "SVM, centered tangent features",
}
COLUMNS = {
    "Loss": ("loss", 3), "Network error": ("test_error", 4), "SVM error": ("tangent.test_error", 4),
    "SVM error, centered": ("tangent centered.test_error", 4),
    "SVM error, conjugate": ("conjugate.test_error", 4), "Margin": ("tangent.margin", 4),
    "Alignment": ("tangent.alignment", 3), "Alignment, centered": ("tangent.alignment_centered", 3),
    "Effective rank": ("tangent.effective_rank", 2), "Agreement": ("tangent.agreement", 4),
    "Tangent and conjugate": ("tangent_conjugate_alignment", 3),
}  # fmt: skip
EXAMPLES = 3


def picture_parts(work: Work) -> Iterator[StudyPart]:
    """A few test images of each pair with their transforms."""
    for pair, (data, _) in PAIRS.items():
        if data in work.sets:
            name = pair.lower().replace(" ", "-").replace("/", "-")
            yield StudyPart("pictures", pair, f"{name}-pictures", pictures, (pair,))


def pictures(work: Work, pair: str) -> Result:
    """The first test images and the first transform of each group: uint8 [images, 1 + transforms, H, W, channels]."""
    data = images(work, pair)
    x = data.x_test[:EXAMPLES]
    groups = standard(tuple(x.shape[1:]))
    strips = torch.stack([x, *(group[0](x) for group in groups.values())], 1).clamp(0, 1)
    pixels = (255 * strips).round().to(torch.uint8).movedim(2, -1).numpy()
    return Result({"labels": [data.classes[i] for i in data.y_test[:EXAMPLES]]}, {"images": pixels})


def _series(results: Results, setting: Setting, path: str) -> tuple[list[float], list[Estimate]]:
    """Mean training loss and mean of a number at each moment that some seed reached.

    The network's error before training, a guess that would hide all others, is left out.
    """
    x, values = [], []
    for moment in (*((START,) if path != "test_error" else ()), *map(str, results.work.sizes.losses)):
        if measured(results, setting, moment):
            value = estimate(results, setting, moment, path)
            if not math.isnan(value.value):
                x.append(estimate(results, setting, moment, "loss").value)
                values.append(value)
    return x, values


def loss_curve(results: Results, setting: Setting, path: str, name: str, scale: float = 1, dash: str = "solid") -> Item:
    """A number against the training loss, mean over seeds with its standard error."""
    x, values = _series(results, setting, path)
    errors = [0.0 if math.isnan(v.error) else scale * v.error for v in values]
    return curve(name, x, [scale * v.value for v in values], error=errors, dash=dash)


def sections(results: Results) -> Iterator[Section]:
    """One section per pair of classes, then learning rates and augmentation, then the list of runs."""
    for pair in PAIRS:
        chosen = [setting for setting in main_settings(results) if setting.pair == pair]
        if chosen:
            yield _pair_section(results, pair, chosen)
    compared = [(s, s._replace(lr=0.1)) for s in main_settings(results)]
    compared += [(s, s._replace(augmented=True)) for s in main_settings(results)]
    compared = [(one, other) for one, other in compared if measured(results, other, START)]
    if compared:
        yield _comparison_section(results, compared)
    yield _runs_section(results)


def error_lines(results: Results, chosen: Sequence[Setting], machines: dict[str, str]) -> Item:
    """Test errors of the network and of machines with its kernel against the training loss."""
    reading = (
        "Training goes from right to left. The machines are hard-margin SVMs without bias, with the network’s kernel "
        "at that moment; where nothing separates the classes, another machine. The network before training, which "
        "guesses, is left out."
    )
    panels = [(s.network, [loss_curve(results, s, path, name, 100) for path, name in machines.items()]) for s in chosen]
    return lines(
        "Test error against training loss", reading, "training loss", "test error, %", panels, log="x", wide=True
    )


def _pair_section(results: Results, pair: str, chosen: Sequence[Setting]) -> Section:
    """Errors and cosines of one pair of classes against the training loss."""
    items = [error_lines(results, chosen, MACHINES)]
    items += [cosine_lines(results, chosen, form) for form in ("raw", "centered")]
    items.append(kernel_table(results, chosen))
    arrays = {}
    for result in results["pictures"].get(pair, []):
        arrays = {f"pictures/{pair}": result.arrays["images"]}
        items += [_examples(results, pair, setting, result) for setting in chosen]
    counts = "; ".join(f"{s.network}: {len(measured(results, s, START))} seeds" for s in chosen)
    return Section(pair, pair, f"Plain SGD, learning rate 0.01, batches of 32. {counts}; ± is one standard error "
                   "over seeds.", items, arrays)  # fmt: skip


def cosine_lines(results: Results, chosen: Sequence[Setting], form: str) -> Item:
    """Cosines between images and their transforms against the training loss; of raw or centered features."""
    words = {"raw": "raw features", "centered": "features minus their mean"}[form]
    panels = []
    for setting in chosen:
        curves = [
            loss_curve(results, setting, f"tangent.cosines.{name}.{form}.mean", name)
            for name in probes(results, setting)
        ]
        path = f"tangent.cosines.pairs.{form}.mean"
        panels.append((setting.network, [*curves, loss_curve(results, setting, path, "different images", dash="dash")]))
    return lines(
        f"Cosine between an image and its transform, {words}",
        "1: the kernel does not see the transform. Dashed: the mean cosine of two different images, which moves, too.",
        "training loss", "cosine", panels, log="x", wide=True,
    )  # fmt: skip


def kernel_table(results: Results, chosen: Sequence[Setting], columns: Mapping[str, tuple[str, int]] = COLUMNS) -> Item:
    """Numbers of the tangent kernel at each moment: by the column's title their path and digits."""
    rows = []
    for setting in chosen:
        for moment in (START, *map(str, results.work.sizes.losses)):
            count = len(measured(results, setting, moment))
            if count:
                values = (estimate(results, setting, moment, path) for path, _ in columns.values())
                texts = [_cell(v, digits) for v, (_, digits) in zip(values, columns.values(), strict=True)]
                rows.append([setting.network, "start" if moment == START else f"≤ {moment}", str(count), *texts])
    note = (
        "Margin: of the hard-margin SVM, over the features’ root mean square norm. Agreement: part of the test images "
        "on which the machine and the network predict the same. Tangent and conjugate: alignment of the two kernels, "
        "not centered."
    )
    return table("The kernel at each moment", ["Network", "Moment", "Seeds", *columns], rows, note, folded=True)


def _cell(value: Estimate, digits: int) -> str:
    """A value with its standard error, where they are known."""
    if math.isnan(value.value):
        return "–"
    return f"{value.value:.{digits}f}" if math.isnan(value.error) else f"{value:.{digits}f}"


def _examples(results: Results, pair: str, setting: Setting, pictured: Result) -> Item:
    """Test images with their transforms, and cosines before training and at the last loss."""
    names = probes(results, setting)
    moments = [m for m in (START, *map(str, results.work.sizes.losses)) if measured(results, setting, m)]
    runs = [measured(results, setting, m) for m in (moments[0], moments[-1])]
    seeds = set(runs[0]) & set(runs[1])
    ends = [np.mean([run.arrays["tangent.cosine.raw"] for s, run in one.items() if s in seeds], 0) for one in runs]
    cases = []
    for i, label in enumerate(pictured.numbers["labels"]):
        shown = [
            {
                "image": [f"pictures/{pair}", [i, 1 + j]], "caption": name,
                "value": " → ".join(fixed(end[j, i], 2) for end in ends), "other": False,
            }
            for j, name in enumerate(names)
        ]  # fmt: skip
        text = f"A test image, {label}. Mean over {len(seeds)} seed{'s' * (len(seeds) > 1)}."
        cases.append({
            "image": [f"pictures/{pair}", [i, 0]], "text": text,
            "strips": [{"heading": f"cosine before training → at loss {moments[-1]}", "images": shown}],
        })  # fmt: skip
    return {"kind": "images", "title": f"Images and their transforms: {setting.network}", "cases": cases}


def _comparison_section(results: Results, compared: Sequence[tuple[Setting, Setting]]) -> Section:
    """Other learning rates and augmentation beside the main setting, at equal loss."""
    rows = []
    numbers = {"tangent.test_error": 4} | {f"tangent.cosines.{name}.raw.mean": 3 for name in (*INVARIANT, SWAP)}
    for pair in compared:
        for loss in map(str, results.work.sizes.losses):
            if all(measured(results, setting, loss) for setting in pair):
                at = [(setting, loss) for setting in pair]
                seeds = {path: common_seeds(results, *at, paths=[path]) for path in numbers}
                for setting in pair:
                    values = (estimate(results, setting, loss, path, seeds=seeds[path]) for path in numbers)
                    texts = [_cell(v, digits) for v, digits in zip(values, numbers.values(), strict=True)]
                    how = f"{setting.lr:g}" + ", augmented" * setting.augmented
                    rows.append([f"{setting.pair}, {setting.network}", how, loss, *texts])
    columns = ["Setting", "Learning rate", "Loss", "SVM error", *INVARIANT, SWAP]
    note = "Rows in pairs: the two runs at the same training loss, over the seeds that both have."
    return Section(
        "Learning rate and augmentation at equal loss", "Equal loss",
        "Each run is stopped at the same training losses, so that kernels are compared at equal loss.",
        [table("SVM error and cosines", columns, rows, note)],
    )  # fmt: skip


def _runs_section(results: Results) -> Section:
    """What was run, and what was not reached."""
    rows = []
    for setting, runs in results["training"].items():
        for run in runs:
            told = run.numbers
            reached = [
                f"{loss}: {step / told['steps_per_epoch']:.2f}"
                for loss, step in told["steps"].items()
                if step is not None
            ]
            missing = ", ".join(f"{loss:g}" for loss in told["not_reached"]) or "–"
            epochs = told["last"] / told["steps_per_epoch"]
            rows.append([str(setting), f"{epochs:.0f}", ", ".join(reached) or "–", missing, f"{told['lowest']:.3f}"])
    columns = ["Run", "Epochs", "Epochs to each loss", "Not reached", "Lowest loss"]
    return Section(
        "Runs", "Runs", "A loss that is not reached within the epochs allowed is left out; the run goes on without it.",
        [table("Training runs", columns, rows, folded=True)],
    )  # fmt: skip

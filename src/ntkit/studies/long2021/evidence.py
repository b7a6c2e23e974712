"""Differences between two moments or two runs at equal loss, paired by seed and by test image."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ntkit.studies.claim import SURE, Estimate, mean
from ntkit.studies.long2021.long_setting import PAIRS, START, Setting, most_seeds
from ntkit.studies.part import Result
from ntkit.studies.study import Results

INVARIANT = ("shift", "rotation", "zoom")
SWAP = "quadrant swap"


class Difference(NamedTuple):
    """Mean of a difference over seeds, its standard errors over seeds and over test images, and numbers of both."""

    value: float
    over_seeds: float
    over_images: float
    seeds: int
    images: int

    def estimate(self) -> Estimate:
        """The value with the error of the wider interval of the two."""
        both = (Estimate(self.value, self.over_seeds, self.seeds), Estimate(self.value, self.over_images, self.images))
        return max((e for e in both if not math.isnan(e.error)), key=lambda e: e.beyond(SURE), default=both[0])


def measured(results: Results, setting: Setting, moment: str, experiment: str = "moment") -> dict[int, Result]:
    """The finished parts of a moment by seed, where it was reached."""
    runs = results[experiment].get((setting, moment), [])
    return {run.numbers["seed"]: run for run in runs if run.numbers["status"] == "measured"}


def losses(results: Results, *settings: Setting) -> list[str]:
    """Losses that every run of each setting has reached, from the largest.

    In unfinished work a loss whose part is missing for some of the runs is left out: its numbers are of fewer seeds.
    """
    return [
        loss
        for loss in map(str, sorted(results.work.sizes.losses, reverse=True))
        if all(_all_reached(results, setting, loss) for setting in settings)
    ]


def _all_reached(results: Results, setting: Setting, loss: str) -> bool:
    moments = results["moment"]
    runs = moments.get((setting, loss), [])
    most = max(len(moments.get((setting, str(other)), [])) for other in results.work.sizes.losses)
    return bool(runs) and len(runs) == most and all(run.numbers["status"] == "measured" for run in runs)


def not_judged(results: Results, seeds: int, *settings: Setting) -> str:
    """Why a claim from so many seeds of these settings is not judged; empty where it is. An error takes two seeds."""
    return "; one seed, not judged" if seeds < 2 else unfinished(results, *settings)


def unfinished(results: Results, *settings: Setting) -> str:
    """How many seeds of a setting are finished, where others are to come; else empty.

    A verdict waits for all of them: one that is passed whenever some are finished would pass noise more often than its
    test says.
    """
    for setting in settings:
        moments, planned = (START, *map(str, results.work.sizes.losses)), most_seeds(results.work, setting)
        finished = min(len(results["moment"].get((setting, moment), [])) for moment in moments)
        if finished < planned:
            return f"; {finished} of {planned} seeds so far, not judged"
    return ""


def main_settings(results: Results, network: str | None = None) -> Iterator[Setting]:
    """The finished settings of the paper's main experiment: learning rate 0.01, no augmentation."""
    for pair in PAIRS:
        for name in ("vgg", "mlp") if network is None else (network,):
            if measured(results, Setting(pair, name), START):
                yield Setting(pair, name)


def number(result: Result, path: str) -> float:
    """A number of a part by its names, joined by dots; NaN where it is undefined."""
    value: Any = result.numbers
    for name in path.split("."):
        value = value[name]
    return math.nan if value is None else float(value)


def estimate(
    results: Results,
    setting: Setting,
    moment: str,
    path: str,
    experiment: str = "moment",
    seeds: Collection[int] | None = None,
) -> Estimate:
    """Mean of a number over seeds, or over these alone, with its standard error."""
    runs = measured(results, setting, moment, experiment)
    return mean_of([number(run, path) for seed, run in runs.items() if seeds is None or seed in seeds])


def common_seeds(
    results: Results, *moments: tuple[Setting, str], paths: Sequence[str] = (), experiment: str = "moment"
) -> set[int]:
    """The seeds of all these moments where all these numbers are defined: numbers set beside one another are of them.

    A kernel without a machine has no test error: a mean that left out its seed would be set beside one that did not.
    """
    kept = []
    for moment in moments:
        runs = measured(results, *moment, experiment)
        kept.append({s for s, run in runs.items() if not any(math.isnan(number(run, path)) for path in paths)})
    return set.intersection(*kept)


def mean_of(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the values that are defined."""
    kept = [v for v in values if not math.isnan(v)]
    if not kept:
        return Estimate(math.nan)
    return mean(kept)


def difference(
    results: Results,
    one: tuple[Setting, str],
    other: tuple[Setting, str],
    path: str,
    images: str,
    row: int | None = None,
    experiment: str = "moment",
) -> Difference:
    """`path` at `one` minus `path` at `other`; array `images` (its row, if given) has the values by test image."""

    def by_image(run: Result) -> np.ndarray:
        values = run.arrays[images].astype(float)
        return values if row is None else values[row]

    first, second = measured(results, *one, experiment), measured(results, *other, experiment)
    return paired(first, second, lambda run: number(run, path), by_image)


def paired(
    first: dict[int, Result],
    second: dict[int, Result],
    value: Callable[[Result], float],
    by_image: Callable[[Result], np.ndarray],
) -> Difference:
    """Mean difference over the seeds of both, where it is defined."""
    values, images = {}, []
    for seed in sorted(set(first) & set(second)):
        change = value(first[seed]) - value(second[seed])
        if not math.isnan(change):
            values[seed] = change
            images.append(by_image(first[seed]) - by_image(second[seed]))
    over_seeds = mean_of(list(values.values()))
    each = np.nanmean(np.stack(images), 0) if images else np.empty(0)
    each = each[~np.isnan(each)]
    over_images = float(each.std(ddof=1) / len(each) ** 0.5) if images else math.nan
    return Difference(over_seeds.value, over_seeds.error, over_images, len(values), len(each))


def error_change(results: Results, setting: Setting, loss: str, kernel: str = "tangent") -> Difference:
    """Change of the machine's test error from before training to a loss."""
    return difference(results, (setting, loss), (setting, START), f"{kernel}.test_error", f"{kernel}.wrong")


def cosine_change(
    results: Results, one: tuple[Setting, str], other: tuple[Setting, str], name: str, form: str = "raw"
) -> Difference:
    """Difference of the mean cosine between images and their transform, under the tangent kernel."""
    path = f"tangent.cosines.{name}.{form}.mean"
    return difference(results, one, other, path, f"tangent.cosine.{form}", probes(results, one[0]).index(name))


def probes(results: Results, setting: Setting) -> list[str]:
    """Names of the transforms that were measured in a setting, in the order of the arrays' rows."""
    run = next(iter(measured(results, setting, START).values()))
    return [name for name in run.numbers["tangent"]["cosines"] if name != "pairs"]

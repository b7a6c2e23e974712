"""What the paper did not ask: layers, the time along training, ten classes, residual networks and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from ntkit.studies.long2021.along import along_part
from ntkit.studies.long2021.by_layer import END, layer_part
from ntkit.studies.long2021.long_setting import ADDED, PAIRS, SECOND, START, TEN, Setting, extent, training_part
from ntkit.studies.long2021.many_classes import class_part
from ntkit.studies.long2021.moments import moment_part
from ntkit.studies.part import StudyPart, Work

PAPER_NETWORKS = ("mlp", "vgg")
# of the settings that are not in the paper: their samples are smaller, so an epoch has fewer steps. The transformer's
# kernel is so large before training that 0.1 is beyond what gradient descent bears.
RATES = {"mlp": 0.1, "vgg": 0.1, "residual": 0.1, "transformer": 0.01}


def main_pairs(work: Work) -> list[str]:
    """The pairs of the paper's main setting whose files are there; of the digits only without those."""
    pairs = [pair for pair, (data, _) in PAIRS.items() if data in work.sets and pair != SECOND]
    return [pair for pair in pairs if len(pairs) == 1 or not pair.startswith("digits")]


def main_runs(work: Work) -> Iterator[tuple[Setting, int]]:
    """Runs of the paper's main setting whose kernels are taken apart."""
    for pair, name in product(main_pairs(work), PAPER_NETWORKS):
        yield from product([Setting(pair, name)], work.seeds[: min(extent(work).seeds, work.sizes.seeds)])


def added_runs(work: Work) -> Iterator[tuple[Setting, int]]:
    """Ten classes, then residual networks and transformers on two; the first seed of all before the others."""
    tens = [pair for pair, data in TEN.items() if data in work.sets]
    tens = [pair for pair in tens if len(tens) == 1 or not pair.startswith("digits")]
    chosen = [Setting(pair, name, RATES[name]) for pair, name in product(tens, (*PAPER_NETWORKS, *ADDED))]
    chosen += [Setting(pair, name, RATES[name]) for pair, name in product(main_pairs(work), ADDED)]
    for seed in work.seeds[: extent(work).added]:
        yield from ((setting, seed) for setting in chosen)


def parts(work: Work) -> Iterator[StudyPart]:
    """All parts, after those of the paper's own experiments."""
    for setting, seed in main_runs(work):
        yield from (layer_part(setting, seed, moment) for moment in (START, END))
        yield along_part(setting, seed)
    for setting, seed in added_runs(work):
        part = class_part if setting.pair in TEN else moment_part
        yield part(setting, seed, START)
        yield training_part(setting, seed)
        yield from (part(setting, seed, str(loss)) for loss in work.sizes.losses)

"""The sentences of the paper's abstract as claims, one for each pair of classes and network, at every loss reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ntkit.studies.claim import FALLS, RISES, Bound, Claim, Condition, Estimate
from ntkit.studies.long2021.evidence import (
    INVARIANT,
    SWAP,
    common_seeds,
    cosine_change,
    difference,
    error_change,
    estimate,
    losses,
    main_settings,
    measured,
    not_judged,
    number,
    unfinished,
)
from ntkit.studies.long2021.long_setting import START, Setting
from ntkit.studies.study import Results

MUCH = 2 / 3  # the error at most this part of the initial one counts as much more accurate


def shown(value: Estimate, spec: str = ".2f", unit: str = "") -> str:
    """A value with its standard error, where there is one."""
    error = "" if math.isnan(value.error) else f" ± {value.error:{spec.removeprefix('+')}}"
    return f"{value.value:{spec}}{error}{unit}".replace("-", "−")


def percent(value: Estimate) -> str:
    """A share in percent, with its standard error, where there is one."""
    return shown(Estimate(100 * value.value, 100 * value.error), unit=" %")


def _where(changes: dict[str, list[Estimate]], bound: Bound) -> str:
    """The losses at which every value keeps the bound."""
    kept = [loss for loss, values in changes.items() if bound.holds(values)]
    if len(kept) == len(changes):
        return "at every loss"
    return "at no loss" if not kept else f"at loss {', '.join(kept)} only"


def _by_loss(changes: dict[str, list[Estimate]], bound: Bound, names: Sequence[str] = ()) -> str:
    """Changes at each loss, and where they keep the bound."""
    texts = []
    for loss, values in changes.items():
        words = [f"{name} {shown(v, '+.3f')}".strip() for name, v in zip(names or [""], values, strict=True)]
        texts.append(f"{loss}: {', '.join(words)}")
    return f"{_where(changes, bound)}. By loss: {'; '.join(texts)}"


def accuracy(results: Results, setting: Setting, text: str) -> Iterator[Claim]:
    """Whether the machine's error at the last loss is well below that before training; nothing where one is unknown."""
    reached = losses(results, setting)
    if not reached:
        return
    last, path = reached[-1], "tangent.test_error"
    seeds = common_seeds(results, *((setting, moment) for moment in (START, *reached)), paths=[path])
    before = estimate(results, setting, START, path, seeds=seeds)
    if math.isnan(before.value):
        return
    after = {loss: estimate(results, setting, loss, path, seeds=seeds) for loss in reached}
    ratio = after[last].value / before.value if before.value else math.nan
    change = error_change(results, setting, last).estimate()
    conditions = [
        Condition(f"the error at loss {last} over the initial one is", [ratio], Bound("under", MUCH)),
        Condition("the change is", [change], FALLS),
    ]
    why = not_judged(results, len(seeds), setting)
    yield Claim(
        f"{text}: {setting.pair}, {setting.network}",
        f"test error {percent(before)} → "
        + ", ".join(f"{percent(value)} (loss {loss})" for loss, value in after.items())
        + "; network "
        + percent(estimate(results, setting, last, "test_error", seeds=seeds)),
        () if why else conditions,
        "hard-margin SVM, or ridge regression where nothing separates the classes; error of the change: the larger one "
        "of that over seeds and that over test images" + why,
    )


def better(results: Results) -> Iterator[Claim]:
    """Sentence 3: a hard-margin SVM with the after kernel is much more accurate than with the initial kernel."""
    much = []
    for setting in main_settings(results):
        for claim in accuracy(results, setting, "The after kernel’s machine is much more accurate"):
            if claim.conditions:
                much.append(all(c.holds() for c in claim.conditions))
            yield claim
    if much:
        yield Claim(
            "For some pairs of data and network the after kernel is much more accurate",
            f"in {sum(much)} of {len(much)} settings",
            [Condition("the number of settings is", [sum(much)], Bound("at least", 1))],
        )


def cosine_claim(
    results: Results,
    setting: Setting,
    names: Sequence[str],
    text: str,
    bound: Bound,
    other: Setting | None = None,
    form: str = "raw",
) -> Iterator[Claim]:
    """Cosines of a setting against those before training, or against another setting at equal loss."""
    reached = losses(results, setting) if other is None else losses(results, setting, other)
    found = {
        loss: [
            cosine_change(results, (setting, loss), (setting, START) if other is None else (other, loss), name, form)
            for name in names
        ]
        for loss in reached
    }
    if not found:
        return
    changes = {loss: [one.estimate() for one in values] for loss, values in found.items()}
    kept = [v for values in changes.values() for v in values]
    seeds = min(one.seeds for values in found.values() for one in values)
    note = {
        "raw": "difference of cosines, raw; centered ones and those of different images: see the figures",
        "centered": "difference of cosines of features minus their mean",
    }[form]
    words = "at every loss the difference is"
    why = not_judged(results, seeds, *(one for one in (setting, other) if one is not None))
    told = _by_loss(changes, bound, names if len(names) > 1 else ())
    yield Claim(text, told, () if why else [Condition(words, kept, bound)], note + why)


def globalness(results: Results) -> Iterator[Claim]:
    """Sentences 4 and 5: VGG-like networks become more global, fully connected ones less."""
    for network, words, bound in (("vgg", "more", FALLS), ("mlp", "less", RISES)):
        for setting in main_settings(results, network):
            text = f"The after kernel is {words} global (cosine under a quadrant swap): {setting.pair}, {network}"
            yield from cosine_claim(results, setting, [SWAP], text, bound)


def invariance(results: Results) -> Iterator[Claim]:
    """Sentence 6, first half: more invariant to small shifts, rotations and zooms."""
    for setting in main_settings(results):
        text = f"It is more invariant to small shifts, rotations, zooms: {setting.pair}, {setting.network}"
        yield from cosine_claim(results, setting, INVARIANT, text, RISES)


def augmentation(results: Results) -> Iterator[Claim]:
    """Sentence 6, second half: data augmentation does not improve these invariances."""
    for setting in main_settings(results):
        augmented = setting._replace(augmented=True)
        if measured(results, augmented, START):
            text = f"Augmentation does not improve these invariances: {setting.pair}, {setting.network}"
            yield from cosine_claim(results, augmented, INVARIANT, text, Bound("at most", 0, errors=-2), setting)


def conjugate(results: Results) -> Iterator[Claim]:
    """Sentence 7: the conjugate kernel is sometimes, not always, a good approximation."""
    good = []
    for setting in main_settings(results):
        for moment in (START, *losses(results, setting)[-1:]):
            paths = ("conjugate.test_error", "tangent.test_error")
            seeds = common_seeds(results, (setting, moment), paths=paths)
            if not seeds:
                continue
            errors = [estimate(results, setting, moment, path, seeds=seeds) for path in paths]
            runs = [run for seed, run in measured(results, setting, moment).items() if seed in seeds]
            by_image = [r.arrays["conjugate.wrong"].astype(float) - r.arrays["tangent.wrong"] for r in runs]
            spread = np.mean(by_image, 0)
            gap = Estimate(errors[0].value - errors[1].value, float(spread.std(ddof=1) / len(spread) ** 0.5))
            no_worse, why = Bound("at most", 0, errors=-2).holds([gap]), unfinished(results, setting)
            good += [] if why else [no_worse]
            when = "before training" if moment == START else f"at loss {moment}"
            yield Claim(
                f"Conjugate kernel in place of the tangent kernel {when}: {setting.pair}, {setting.network}",
                f"test error {percent(errors[0])} against {percent(errors[1])}; alignment of the two kernels "
                f"{shown(estimate(results, setting, moment, 'tangent_conjugate_alignment', seeds=seeds))}",
                note="no worse, within 2 standard errors over test images: " + ("yes" if no_worse else "no") + why,
            )
    if good:
        yield Claim(
            "The conjugate kernel is sometimes, but not always, a good approximation",
            f"its machine is no worse than the tangent kernel’s in {sum(good)} of {len(good)} cases",
            [
                Condition("the number of such cases is", [sum(good)], Bound("at least", 1)),
                Condition("of others", [len(good) - sum(good)], Bound("at least", 1)),
            ],
        )


def larger_rate(results: Results) -> Iterator[Claim]:
    """Sentences 8 and 9: a larger learning rate at equal loss is better, more global, more invariant."""
    for setting in main_settings(results):
        fast = setting._replace(lr=0.1)
        common = losses(results, fast, setting)
        if not common:
            continue
        found = [
            difference(results, (fast, loss), (setting, loss), "tangent.test_error", "tangent.wrong") for loss in common
        ]
        kept = [one.estimate() for one in found]
        changes = {loss: [value] for loss, value in zip(common, kept, strict=True)}
        seeds = min(one.seeds for one in found)
        rule = Condition("at every loss the difference of test errors is", kept, FALLS)
        name = f"{setting.pair}, {setting.network}"
        why = not_judged(results, seeds, setting, fast)
        yield Claim(
            f"A larger learning rate at equal loss gives a better kernel: {name}",
            _by_loss(changes, FALLS),
            () if why else [rule],
            "learning rate 0.1 against 0.01, error of the kernel’s machine" + why,
        )
        yield from cosine_claim(results, fast, [SWAP], f"and a more global one: {name}", FALLS, setting)
        yield from cosine_claim(results, fast, INVARIANT, f"and a more invariant one: {name}", RISES, setting)


def control(results: Results) -> Iterator[Claim]:
    """The network that sees only the sum of the pixels: nothing changes under the swap."""
    for (setting, moment), runs in results["moment"].items():
        if setting.network == "sum" and moment == START:
            values = [number(r, f"tangent.cosines.{SWAP}.raw.mean") for r in runs]
            yield Claim(
                f"Control: a network of the sum of the pixels does not see the swap: {setting.pair}",
                f"cosine {min(values):.6f}",
                [Condition("it is", values, Bound("at least", 1 - 1e-5))],
            )


CLAIMS: Sequence[Callable[[Results], Iterator[Claim]]] = (
    better,
    globalness,
    invariance,
    augmentation,
    conjugate,
    larger_rate,
    control,
)

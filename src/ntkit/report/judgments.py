"""Every sentence of a report that judges: the numbers it needs, the rule that chooses it, and the threshold it prints.

A report also lists numbers, which need no rule. Where it says more than its numbers (better, towards, hardly, beyond
noise), the sentence comes from a `Judgment` here, or in `compare_judgments`. `RULES` are printed at the end of each
report of `ntkit analyze`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ntkit.explanations.trust_limits import MISS, SMOOTH
from ntkit.report.words import Number

LEVEL = 0.05
"""p value below which a difference on the same examples is beyond noise."""
NOISE = 2.0
"""Standard errors in the place of a p value, of runs of earlier versions."""
LITTLE = 0.2
"""Share of the training targets explained, below which a network hardly fits its training set."""
TURNED = 0.02
"""Change of the centered alignment below which there is hardly any."""
CHANGED = 0.01
"""Distance of a kernel from the first one, 1 - cosine, below which its shape hardly changed."""
COSINE = 0.01
"""Change of a mean cosine below which nothing is said of it."""
SMALLEST = 0.01
"""Difference of two squared errors, as a share of the second one, below which neither is called better."""
NEAR, FAR = 0.1, 0.5
"""Distance of the first-order network's outputs from the network's, as a share of how far training moved them."""
FEWEST = 4
"""Snapshots below which a curve has no wander to compare its change with."""


@dataclass(frozen=True, eq=False)
class Judgment:
    """What a report may say of some numbers.

    Attributes
    ----------
    rule : the rule in words, with its threshold; it is printed.
    verdict : the rule itself, from numbers to a key of `sentences`.
    sentences : verdict -> what is said; "" where nothing is.
    """

    rule: str
    verdict: Callable[..., str]
    sentences: Mapping[str, str]

    def say(self, *numbers: object) -> str:
        """The sentence for some numbers."""
        return self.sentences[self.verdict(*numbers)]


def different_errors(p: float | None, difference: float | None) -> str:
    """Verdict on two error rates on the same examples, by McNemar's p value: the first is "below" the other, or so.

    >>> different_errors(0.049, -0.1), different_errors(0.05, -0.1), different_errors(0.01, 0.1)
    ('below', 'same', 'above')
    """
    if p is None or difference is None:
        return "unknown"
    return "same" if p >= LEVEL or difference == 0 else "below" if difference < 0 else "above"


def different_squares(low: float | None, high: float | None, value: float | None, other: float | None) -> str:
    """Verdict on the difference of two squared errors on the same examples, by its interval and beside the other error.

    >>> different_squares(-2.0, -0.1, -1.0, 9.0), different_squares(-2.0, 0.0, -1.0, 9.0)
    ('below', 'same')
    >>> different_squares(0.1, 2.0, 1.0, 9.0), different_squares(0.1, 2.0, 1.0, 101.0)
    ('above', 'same')
    """
    if low is None or high is None or value is None or other is None:
        return "unknown"
    if abs(value) < SMALLEST * other:
        return "same"
    return "below" if high < 0 else "above" if low > 0 else "same"


def fits(share: float | None, right: float = 0.0) -> str:
    """Verdict on how much of the training targets a network explains.

    `right`: share of the errors of the best constant answer that the network does not make.

    >>> fits(0.19), fits(0.2), fits(None), fits(-1.0, 0.9)
    ('hardly', 'fits', 'unknown', 'overconfident')
    """
    if share is None:
        return "unknown"
    if share < 0 and right >= 0.5:
        return "overconfident"
    return "hardly" if share < LITTLE else "fits"


def ends_of(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """First and last value of a curve, and its wander: the largest move against the direction from first to last.

    None where one end is undefined, or where fewer than `FEWEST` values are there to see a wander.

    >>> ends_of([0.1, 0.3, 0.2, 0.4])
    (0.1, 0.4, 0.09999999999999998)
    >>> ends_of([0.4, 0.1, 0.2, 0.3]), ends_of([0.1, 0.4])
    ((0.4, 0.3, 0.19999999999999998), None)
    """
    if not values or values[0] is None or values[-1] is None:
        return None
    known = [value for value in values if value is not None]
    if len(known) < FEWEST:
        return None
    sign = 1.0 if known[-1] >= known[0] else -1.0
    highest, wander = sign * known[0], 0.0
    for value in known:
        highest = max(highest, sign * value)
        wander = max(wander, highest - sign * value)
    return known[0], known[-1], wander


def turned(first: float | None, last: float | None, wander: float | None) -> str:
    """Verdict on a change of the alignment with the targets, beside the wander of its curve.

    >>> turned(0.1, 0.5, 0.1), turned(0.5, 0.1, 0.1), turned(0.106, 0.136, 0.06), turned(0.1, 0.119, 0.0)
    ('towards', 'away', 'wanders', 'hardly')
    """
    if first is None or last is None:
        return "undefined"
    if abs(last - first) < TURNED:
        return "hardly"
    if wander is None:
        return "unknown"
    return "wanders" if abs(last - first) <= wander else "towards" if last > first else "away"


def moved(distance: float | None, centered: float | None = None) -> str:
    """Verdict on the distance of the last kernel from the first, 1 - their cosine, not centered and centered.

    >>> moved(0.0099), moved(0.01), moved(0.001, 0.02), moved(None)
    ('hardly', 'changed', 'changed', 'undefined')
    """
    if distance is None:
        return "undefined"
    return "hardly" if max(distance, centered or 0.0) < CHANGED else "changed"


def linear(distance: float | None) -> str:
    """Verdict on the distance of the first-order network's outputs.

    >>> linear(0.0999), linear(0.1), linear(0.4999), linear(0.5), linear(None)
    ('near', 'between', 'between', 'far', 'unknown')
    """
    if distance is None:
        return "unknown"
    return "near" if distance < NEAR else "between" if distance < FAR else "far"


def more_invariant(change: Number) -> str:
    """Verdict on the change of a cosine from before to after training, over the same images.

    Two standard errors take the place of the p value where a run of an earlier version has none.

    >>> cases = ((0.03, 0.04), (0.03, 0.06), (0.009, 0.0))
    >>> [more_invariant({"value": value, "error": 0.01, "p": p}) for value, p in cases]
    ['above', 'same', 'same']
    """
    value, p = change["value"], change.get("p")
    if value is None or (p is None and change["error"] is None):
        return "unknown"
    noise = p >= LEVEL if p is not None else abs(value) <= NOISE * change["error"]
    return "same" if noise or abs(value) < COSINE else "above" if value > 0 else "below"


def trusted(miss: float | None, metasmoothness: float) -> str:
    """Verdict on an influence by its trial and by the run's metasmoothness.

    >>> trusted(0.5, 0.5), trusted(0.51, 0.9), trusted(0.5, 0.49), trusted(None, 0.9)
    ('usable', 'untrusted', 'amplifies', 'untrusted')
    """
    if miss is None or miss > MISS:
        return "untrusted"
    return "usable" if metasmoothness >= SMOOTH else "amplifies"


def separable(status: str) -> str:
    """Verdict on a hard-margin SVM by its status."""
    return status if status in ("optimal", "not separable") else "inaccurate"


_PAIRED = (
    "The two machines answer the same test examples, and only those count that one alone gets wrong. If neither is "
    "better, each of these is as likely to be the one’s as the other’s: beyond noise where that has "
    f"p < {LEVEL:g} (McNemar’s exact test, two-sided)."
)
_SQUARES = (
    "Of the difference of mean squared errors on the same test examples: beyond noise where its interval (95 %, "
    f"Student’s) leaves out 0 and it is at least {100 * SMALLEST:g} % of the other’s error."
)
_ERRORS = {
    "below": "lower than",
    "above": "higher than",
    "same": "no different, beyond noise, from",
    "unknown": "not comparable with",
}
_BEFORE = {
    "below": "Training made a better kernel.",
    "above": "Training made a worse kernel.",
    "same": "No difference beyond noise between the kernels before and after training.",
    "unknown": "The kernels before and after training cannot be compared.",
}
_NETWORK = {
    "below": "The after kernel does better than its network.",
    "above": "The after kernel does worse than its network.",
    "same": "No difference beyond noise between the after kernel and its network.",
    "unknown": "The after kernel cannot be compared with its network.",
}

_LOADED = {
    "below": "The kernel of the loaded weights does better than that of fresh random weights.",
    "above": "The kernel of the loaded weights does worse than that of fresh random weights.",
    "same": "No difference beyond noise between the kernels of the loaded weights and of fresh random ones.",
    "unknown": "The kernels of the loaded weights and of fresh random ones cannot be compared.",
}

BETTER = {
    "init": Judgment(_PAIRED, different_errors, _BEFORE),
    "network": Judgment(_PAIRED, different_errors, _NETWORK),
    "loaded": Judgment(_PAIRED, different_errors, _LOADED),
}
"""Leads on test errors of machines: before and after training, beside the network, of loaded weights."""
LESS_SQUARED_ERROR = {
    "init": Judgment(_SQUARES, different_squares, _BEFORE),
    "network": Judgment(_SQUARES, different_squares, _NETWORK),
    "loaded": Judgment(_SQUARES, different_squares, _LOADED),
}
"""The same of a regression."""
ERROR = Judgment(_PAIRED, different_errors, _ERRORS)
"""How one test error is beside another, within a sentence."""
SQUARED_ERROR = Judgment(_SQUARES, different_squares, _ERRORS)
"""The same of a regression."""
FIT = Judgment(
    f"A network hardly fits its training set where it explains less than {100 * LITTLE:.0f} % of it: 1 minus its "
    "training loss over that of the best constant prediction or, for numbers, R². A network with a loss above the "
    "constant’s and at most half of its errors is too sure of itself instead.",
    fits,
    {
        "hardly": "The network hardly fits its training set: all that follows is about such a network.",
        "overconfident": "The network gets most of its training set right but is too sure of its errors.",
        "fits": "",
        "unknown": "How well the network fits its training set is unknown.",
    },
)
"""Said before anything else."""
TURN = Judgment(
    f"The kernel turned where the change of its centered alignment, first to last snapshot, is at least {TURNED:g} "
    "and larger than the largest move of the curve the other way.",
    turned,
    {
        "towards": "The kernel turned towards the task.",
        "away": "The kernel turned away from the task.",
        "wanders": "Alignment with the task changed no more than it wanders along training.",
        "hardly": "Alignment with the task hardly changed.",
        "unknown": "Alignment with the task, before and after training.",
        "undefined": "Alignment with the task is undefined.",
    },
)
"""Lead on the alignment."""
SHAPE = Judgment(
    "The kernel changed its shape where 1 minus its cosine with the first kernel, centered or not, is at least "
    f"{CHANGED:g}.",
    moved,
    {
        "undefined": "How far the kernel changed is undefined.",
        "hardly": "The kernel hardly changed shape.",
        "changed": "The kernel changed along training.",
    },
)
"""Lead on the kernel along training."""
LINEAR = Judgment(
    "The first-order network is trained with the same start, batches and optimizer. The network stayed near it where "
    f"their test outputs differ by less than {NEAR:g} of how far training moved the network’s, and went far from it "
    f"where they differ by at least {FAR:g} of that.",
    linear,
    {
        "near": "The network trained as in the limit of infinite width.",
        "between": "The network trained partly as in the limit of infinite width.",
        "far": "The network trained unlike the limit of infinite width.",
        "unknown": "How far the network went from its first-order network is unknown.",
    },
)
"""Lead on the limit."""
_COSINES = (
    f"A cosine changed beyond noise where its mean change over the same images is at least {COSINE:g} and has "
    f"p < {LEVEL:g} (Student’s t test). Each transformation is judged by itself."
)
INVARIANCE = Judgment(
    _COSINES,
    more_invariant,
    {
        "above": "more invariant to",
        "below": "less invariant to",
        "same": "no different, beyond noise, for",
        "unknown": "not comparable for",
    },
)
"""Of transformations that keep the layout of an image."""
LAYOUT = Judgment(
    _COSINES,
    more_invariant,
    {
        "below": "more global for",
        "above": "less global for",
        "same": "no more and no less global, beyond noise, for",
        "unknown": "not comparable for",
    },
)
"""Of transformations that break the layout and keep local statistics: a low cosine means a global kernel."""
BEYOND = Judgment(
    "A change of a cosine says something of its transformation only where it exceeds the change for two different "
    f"images: over the same images, by at least {COSINE:g} and with p < {LEVEL:g}.",
    more_invariant,
    {"above": "beyond", "below": "below", "same": "not larger beyond noise", "unknown": "unknown"},
)
"""Of raw cosines that change in the direction in which those of two different images do."""
SEPARABLE = Judgment(
    "A hard-margin SVM exists only on a kernel that separates the training classes. Where one of two kernels does not, "
    "ridge regression is compared on both.",
    separable,
    {
        "optimal": "",
        "not separable": "does not separate the classes",
        "inaccurate": "was not solved to the required gap",
    },
)
"""Of a machine."""

TRUST = Judgment(
    f"Influence is not to be trusted where it misses more than {100 * MISS:.0f} % of the real changes in a trial with "
    f"all weights changed at random by 5 %. Below a metasmoothness of {SMOOTH:g} training amplifies small changes.",
    trusted,
    {
        "untrusted": "Do not trust the influence in this run",
        "amplifies": "Training amplifies small changes in this run",
        "usable": "Influence can be used here",
    },
)
"""First thing said of explained predictions; numbers follow."""

RULES: dict[str, Sequence[Judgment]] = {
    "Errors on the same test examples": (ERROR, *BETTER.values()),
    "Squared errors": (SQUARED_ERROR, *LESS_SQUARED_ERROR.values()),
    "Fit": (FIT,),
    "Separable": (SEPARABLE,),
    "Turned towards the task": (TURN,),
    "Changed shape": (SHAPE,),
    "As in the limit of infinite width": (LINEAR,),
    "Invariant, global": (INVARIANCE, LAYOUT),
    "Beside two different images": (BEYOND,),
    "Influence": (TRUST,),
}
"""By what is judged; a report prints the rules that it uses."""


_OF_SECTIONS = {
    "along": ("Changed shape",),
    "limit": ("As in the limit of infinite width",),
    "invariances": ("Invariant, global", "Beside two different images"),
    "explained": ("Influence",),
}
"""Rules that a report uses only where it has the section."""


def rules(regression: bool, sections: Collection[str]) -> list[tuple[str, str]]:
    """What is judged and the rule in words, of those that a report of `ntkit analyze` with some sections uses."""
    left_out = {"Errors on the same test examples", "Separable"} if regression else {"Squared errors"}
    left_out |= {name for section, names in _OF_SECTIONS.items() if section not in sections for name in names}
    return [(name, judgments[0].rule) for name, judgments in RULES.items() if name not in left_out]

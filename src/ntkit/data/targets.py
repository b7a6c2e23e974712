"""Targets of any kind: classes as integers, text, booleans or one-hot rows; or the numbers of a regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ntkit.base.checks import check_name, refusal
from ntkit.base.numbers import few_enough_for_labels, means_and_deviations, refuse_masked
from ntkit.data.columns import too_far

Task = Literal["classification", "regression"]
TASKS = ("classification", "regression")
_MOST = 1000  # classes without names: more are numbers or ids in place of labels
_MISSING = ("nan", "<na>", "nat", "#n/a")  # what becomes of a missing value when pandas makes text of it
_EXPECTED = "integers, text, booleans or floats of shape [n], one-hot rows [n, C] or floats [n, outputs]"


class Targets(NamedTuple):
    """What a regression predicts: names, and mean and standard deviation on the training set, in the given units.

    In a `Data`, y is the given target minus the mean, over the deviation.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def in_units(self, y: Tensor) -> Tensor:
        """Standardized values [n, outputs] in the units that the targets were given in, float64."""
        y = y.double()
        return y * y.new_tensor(self.deviation) + y.new_tensor(self.mean)


def target_array(y: Any, subject: str) -> np.ndarray:
    """Targets as an array [n] or [n, k] of booleans, integers, floats or text; other things are refused."""
    refuse_masked(y, f"{subject}, labels y")
    if isinstance(y, Tensor):
        y = y.detach().cpu()
        y = y.double() if y.is_floating_point() else y
    try:
        array = np.asarray(y)
        if array.dtype.kind == "S":
            array = np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        got = "bytes that are not UTF-8"
        raise refusal(f"{subject}, labels y", got=got, expected=_EXPECTED, fix="Decode the labels.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(y).__name__} that is not an array ({error})"
        raise refusal(f"{subject}, labels y", got=got, expected=_EXPECTED, fix="Convert it first.") from error
    if array.dtype.kind in "OT" and array.size:
        array = _of_one_kind(array, subject)
    if array.dtype.kind not in "biufU" or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] == 0):
        got = f"{array.dtype} of shape {list(array.shape)}"
        raise refusal(f"{subject}, labels y", got=got, expected=_EXPECTED, fix="Give one row per example.")
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _of_one_kind(array: np.ndarray, subject: str) -> np.ndarray:
    """An array of Python objects as one of text or of integers."""
    text = isinstance(array.flat[0], str)
    kind = (str, np.str_) if text else (bool, int, np.integer, np.bool_)
    odd = [i for i, value in enumerate(array.flat) if not isinstance(value, kind)]
    if not odd and not text:
        odd = [i for i, value in enumerate(array.flat) if not -(2**63) <= int(value) < 2**63]
    if not odd:
        return array.astype(np.str_ if text else np.int64)
    row = odd[0] // (array.size // len(array))
    got = f"{array.flat[odd[0]]!r} in row {row:,}"
    expected, fix = "text everywhere, or integers everywhere", "Replace missing values, or remove their rows."
    if isinstance(array.flat[odd[0]], kind):
        expected, fix = "integers below 2^63", "Number the classes; numbers of a regression as floats."
    raise refusal(f"{subject}, labels y", got=got, expected=expected, fix=fix)


def read_targets(
    given: dict[str, np.ndarray], names: Sequence[str] | None, task: Task | None
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Labels (int64 [n]) and names of the classes; or targets (float64 [n, outputs]) and no names.

    Parameters
    ----------
    given : arrays of `target_array`, by subject in errors: the training set's first.
    names : of the classes: of labels 0, 1, ..., or one per label, in ascending order; None: the labels themselves.
    task : None: a regression if there are floats that are no one-hot rows; refused where they may be labels.
    """
    if task is not None and task not in TASKS:
        raise refusal("task", got=repr(task), expected=" or ".join(TASKS), fix="Leave it out, or name one.")
    hot = all(_is_one_hot(y) for y in given.values())
    floats = any(y.dtype.kind == "f" for y in given.values())
    if task == "regression" or (task is None and floats and not hot):
        if names is not None:
            got, fix = "names of classes for targets that are floats", "Give labels, or say task=classification."
            raise refusal("class_names", got=got, expected="none for a regression", fix=fix)
        return _numbers(given, task), ()
    labels = {f"{subject}, labels y": _labels(y, f"{subject}, labels y", hot) for subject, y in given.items()}
    columns = {subject: y.shape[1] for subject, y in given.items()} if hot else {}
    if len(set(columns.values())) > 1:
        (_, first), (subject, other) = columns.items()
        got, expected = f"rows of {other}", f"rows of {first}, as in the training set"
        raise refusal(f"{subject}, labels y", got=got, expected=expected, fix="Prepare both sets the same way.")
    return _indices(labels, names, next(iter(columns.values()), None))


def _is_one_hot(y: np.ndarray) -> bool:
    if y.ndim != 2 or y.dtype.kind not in "biuf":
        return False
    return bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def _numbers(given: dict[str, np.ndarray], task: Task | None) -> list[Tensor]:
    sets = []
    for subject, y in given.items():
        if y.dtype.kind == "U":
            fix = "Give numbers, or leave out task."
            raise refusal(f"{subject}, targets y", got="text", expected="numbers for a regression", fix=fix)
        values = y.reshape(len(y), -1).astype(np.float64)
        if len(bad := np.flatnonzero(~np.isfinite(values).all(1))):
            got = f"{values[bad[0]][~np.isfinite(values[bad[0]])][0]} in row {bad[0]:,} ({len(bad):,} such rows)"
            fix = "Repair or remove these rows."
            raise refusal(f"{subject}, targets y", got=got, expected="finite values", fix=fix)
        sets.append(torch.from_numpy(values))
    (subject, first), *others = zip(given, sets, strict=True)
    for other, values in others:
        if values.shape[1] != first.shape[1]:
            got, expected = f"{values.shape[1]} targets", f"{first.shape[1]}, as in the training set"
            raise refusal(f"{other}, targets y", got=got, expected=expected, fix="Prepare both sets the same way.")
    if task is None and (got := _may_be_labels(first)):
        fix = "Give the labels as integers or text; or say task (--task): classification or regression."
        raise refusal(f"{subject}, y", got=got, expected="labels of classes, or numbers of a regression", fix=fix)
    return sets


def _may_be_labels(y: Tensor) -> str:
    """What floats [n, outputs] are that may be labels as well; empty if they are none."""
    distinct = y.unique().tolist()
    if y.shape[1] > 1:
        return "rows of 0 and 1, of which some have several 1 or none" if set(distinct) <= {0, 1} else ""
    if len(distinct) == 2:
        return f"floats with two values only, {distinct[0]:g} and {distinct[1]:g}"
    few = len(distinct) > 2 and few_enough_for_labels(len(distinct), len(y))
    if few and all(value == round(value) for value in distinct):
        return f"floats that are {len(distinct)} different whole numbers, {distinct[0]:g} to {distinct[-1]:g}"
    return ""


def _labels(y: np.ndarray, subject: str, hot: bool) -> np.ndarray:
    """Labels [n] as text, booleans or int64."""
    if hot:
        return y.argmax(1)
    if y.ndim == 2:
        got = f"{y.dtype} of shape {list(y.shape)}"
        fix = "Give one label per example, or rows with a single 1; numbers of a regression as floats."
        raise refusal(subject, got=got, expected="integers of shape [n], or one-hot rows [n, C]", fix=fix)
    if y.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.isfinite(y) & (y == np.round(y)) & (abs(y) < 2**53)))
        if len(bad):
            got = f"{y[bad[0]]:g} in row {bad[0]:,}"
            fix = "Round them." if np.isfinite(y[bad[0]]) else "Repair or remove these rows."
            raise refusal(subject, got=got, expected="integers for classes", fix=fix)
    if y.dtype.kind == "U":
        _check_texts(y, subject)
    if y.dtype.kind == "u" and len(y) and y.max() >= 2**63:
        raise refusal(subject, got=f"label {y.max()}", expected="labels below 2^63", fix="Number the classes.")
    return y if y.dtype.kind in "bU" else y.astype(np.int64)


def _check_texts(y: np.ndarray, subject: str) -> None:
    """Refuse missing labels, as text too (of pandas), and labels that differ in blanks around them alone."""
    bare = np.char.strip(y)
    missing = (bare == "") | np.isin(np.char.lower(bare), _MISSING)
    if len(rows := np.flatnonzero(missing)):
        label = bare[rows[0]]
        got = f"the missing label {str(label)!r} in row {rows[0]:,}" if label else f"an empty label in row {rows[0]:,}"
        fix = "Name the class, or remove the row."
        raise refusal(subject, got=got, expected="a label for each example", fix=fix)
    names, which = np.unique(y), np.unique(bare)
    if len(which) < len(names):
        twice = next(name for name in names if str(name) != str(name).strip())
        got, fix = f"label {str(twice)!r} beside {str(twice).strip()!r}", "Strip the labels."
        raise refusal(subject, got=got, expected="labels that differ in more than blanks", fix=fix)


def _indices(
    labels: dict[str, np.ndarray], names: Sequence[str] | None, columns: int | None
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Numbers of the classes [n], and the classes' names; `columns`: of one-hot rows."""
    kinds = {subject: "text" if y.dtype.kind == "U" else "numbers" for subject, y in labels.items()}
    if len(set(kinds.values())) > 1:
        subject, kind = list(kinds.items())[-1]
        expected, fix = f"{kinds[next(iter(kinds))]}, as in the training set", "Prepare both sets the same way."
        raise refusal(subject, got=kind, expected=expected, fix=fix)
    distinct = np.unique(np.concatenate(list(labels.values()))).tolist()
    own = list(range(columns)) if columns else distinct
    if names is not None and not isinstance(distinct[0], str):
        count = len(names)
        own = list(range(count)) if distinct[0] >= 0 and distinct[-1] < count else distinct
        if len(own) != count:
            bad = next(label for label in distinct if not 0 <= label < count)
            fix = "Give the names of all classes, in the order of their labels."
            raise _unnamed(labels, bad, f"0 to {count - 1}", fix)
    elif names is not None:
        own = list(names)
        if absent := [label for label in distinct if label not in own]:
            fix = "Give the names of all classes."
            raise _unnamed(labels, absent[0], f"one of {', '.join(own)}", fix)
    if names is None and len(own) > _MOST:
        subject = next(iter(labels))
        fix = "Give the label of a class for each example; for numbers to predict say task=regression (--task)."
        raise refusal(subject, got=f"{len(own):,} different labels", expected=f"at most {_MOST:,}", fix=fix)
    shown = tuple(str(name) for name in (own if names is None else names))
    told = "classes" if names is None else "class_names"
    for name in shown:
        check_name(told, name, "Rename the class.")
    if len(set(shown)) < len(shown):
        raise refusal(told, got=", ".join(shown[:20]), expected="different names", fix="Rename one.")
    order = np.argsort(np.array(own), kind="stable")
    sets = [torch.from_numpy(order[np.searchsorted(np.array(own)[order], y)]) for y in labels.values()]
    return sets, shown


def _unnamed(labels: dict[str, np.ndarray], label: Any, expected: str, fix: str) -> Exception:
    """Refusal of a label without a name."""
    subject, y = next((subject, y) for subject, y in labels.items() if (y == label).any())
    got = f"label {label!r} in row {int((y == label).argmax()):,}"
    return refusal(subject, got=got, expected=expected, fix=fix)


def standardized(
    sets: list[Tensor], names: Sequence[str] | None, subject: str, dtype: torch.dtype
) -> tuple[list[Tensor], Targets]:
    """Targets minus the training set's mean, over its standard deviation, in `dtype`; the first set is for training."""
    train, outputs = sets[0], sets[0].shape[1]
    names = tuple(names) if names is not None else ("y",) if outputs == 1 else tuple(f"y{i}" for i in range(outputs))
    mean, deviation = means_and_deviations(train)
    for name, value, center in zip(names, deviation.tolist(), mean.tolist(), strict=True):
        if not value > 1e-12 * abs(center):
            got = f"{name}, which is {center:g} in every training example"
            raise refusal(f"{subject}, targets y", got=got, expected="targets that vary", fix="Choose other examples.")
    scaled = [((y - mean) / deviation).to(dtype) for y in sets]
    for given, y in zip(sets, scaled, strict=True):
        if len(bad := (~y.isfinite()).nonzero()):
            row, column = bad[0].tolist()
            where = f"{subject}, target {names[column]}"
            raise too_far(where, float(given[row, column]), float(deviation[column]))
    return scaled, Targets(names, tuple(mean.tolist()), tuple(deviation.tolist()))


def in_digits(value: float) -> str:
    """A number with four significant digits, a large one with separators.

    >>> in_digits(253503.7), in_digits(-0.0123456)
    ('253,500', '-0.01235')
    """
    return f"{float(f'{value:.4g}'):,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"

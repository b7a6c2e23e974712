"""The measurements of `ntkit analyze` for a regression: R2 and errors with intervals, ridge regression for the SVM.

Errors are those of standardized targets; those of single targets are in their own units. An interval holds 95 % of
`DRAWS` resamples of the examples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.commands.network_measures import EXAMPLES, TrainingTask, finite, number, outputs_of, spread
from ntkit.data import Data
from ntkit.gram.gram_matrix import Gram
from ntkit.machines import KernelRidge

RIDGES = tuple(10.0**k for k in range(-7, 2))  # relative to the kernel's mean diagonal
DRAWS, SEED = 1000, 0
LEVEL = 0.95
_DRAWN = 400  # test examples in the figure of predictions
_TOLERANCE = 1e-8  # of the relative residual of the solved system


class RegressionTask(TrainingTask):
    """A regression with one output per target: squared error of standardized targets."""

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.data, self.classes, self.binary = data, 0, False
        self.outputs = outputs_of(model, data.x_train[:2]).shape[1]
        if self.outputs != data.outputs:
            got = f"{self.outputs} outputs for {data.outputs} target{'s' if data.outputs > 1 else ''}"
            fix = "Give the factory a parameter named outputs."
            raise refusal(f"model {type(model).__name__}", got=got, expected="one output per target", fix=fix)
        self.name = "half the squared error" + (", summed over targets" if self.outputs > 1 else "")

    def loss(self, out: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Half the squared error of outputs [n, C], summed over targets; its mean, or each sample's."""
        each = 0.5 * ((out.reshape(len(y), -1) - y.to(out)) ** 2).sum(1)
        return each.mean() if reduction == "mean" else each

    def predict(self, out: Tensor) -> Tensor:
        """Standardized predictions [n, C]."""
        return out

    def targets(self, y: Tensor) -> Tensor:
        """Targets of the alignment, float64 [n, C]."""
        return y.double()


def task_of(model: nn.Module, data: Data) -> TrainingTask:
    """What the network is trained for, by the data."""
    return TrainingTask(model, data) if data.targets is None else RegressionTask(model, data)


def network(task: TrainingTask, model: nn.Module) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Loss and errors of the network itself on both sets; and its test predictions."""
    result, data = {}, task.data
    out = {part: outputs_of(model, x) for part, x in (("train", data.x_train), ("test", data.x_test))}
    for part, y in (("train", data.y_train), ("test", data.y_test)):
        loss = task.loss(out[part], y, reduction="none").double()
        error = float(loss.std() / len(y) ** 0.5) if len(y) > 1 else None
        result[f"{part}_loss"] = number(float(loss.mean()), error, f"standard error over {len(y):,} examples")
        result[part] = errors(out[part], y, data, part)
    return result, {"predicted": out["test"].double().cpu().numpy()}


def machine(K: Tensor, K_test: Tensor, data: Data) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Kernel ridge regression with the ridge of least leave-one-out error; and its test predictions."""
    gram = Gram(K)
    scale = float(gram.diagonal().mean())
    y = data.y_train.double()
    fits = [(ridge, KernelRidge(ridge * scale).fit(gram, y)) for ridge in RIDGES]
    solved = [(float((m.loo_**2).mean()), ridge, m) for ridge, m in fits if m.status_ == "solved"]
    if not solved:
        advice = fits[-1][1].advice_
        nothing = {part: errors(torch.full_like(z, torch.nan), z, data, part) for part, z in _both(data)}
        told = {"status": fits[-1][1].status_, "advice": advice, "certificate": "no ridge gave a solution", "n": len(K)}
        return {**told, "ridge": None, "edge": False, "loo": None, "residual": None, **nothing}, {}
    loo, ridge, best = min(solved, key=lambda fit: fit[0])
    predicted = {part: torch.as_tensor(best.predict(values)) for part, values in (("train", K), ("test", K_test))}
    residual = float(best.residual_)
    result = {
        "status": best.status_ if residual <= _TOLERANCE else "inexact",
        "advice": best.advice_,
        "ridge": ridge,
        "edge": ridge in (RIDGES[0], RIDGES[-1]),
        "loo": finite(loo**0.5),
        "residual": finite(residual),
        "certificate": f"residual {residual:.0e}",
        "n": len(K),
        **{part: errors(predicted[part], z, data, part) for part, z in _both(data)},
    }
    return result, {"predicted": predicted["test"].double().cpu().numpy()}


def _both(data: Data) -> list[tuple[str, Tensor]]:
    return [("train", data.y_train), ("test", data.y_test)]


def errors(predicted: Tensor, y: Tensor, data: Data, part: str) -> dict[str, Any]:
    """R2, root mean squared and mean absolute error over all targets, and of each target in its own units.

    R2 is 1 minus the squared error over that of the set's own mean; over several targets, their mean. The squared error
    over all targets is the mean over them.
    """
    assert data.targets is not None
    residuals = (predicted.double() - y.double()).cpu().numpy()
    values, what = y.double().cpu().numpy(), f"{part} examples"
    by_target: list[dict[str, Any]] = []
    for c, (name, deviation) in enumerate(zip(data.targets.names, data.targets.deviation, strict=True)):
        own = _resampled(residuals[:, c : c + 1], values[:, c : c + 1], what)
        by_target.append({"name": name, "r2": own["r2"]} | {k: _times(own[k], deviation) for k in ("rmse", "mae")})
    return {**_resampled(residuals, values, what), "targets": by_target}


def _times(entry: dict[str, Any], factor: float) -> dict[str, Any]:
    return {key: v * factor if isinstance(v, float) else v for key, v in entry.items()}


def _sums(columns: np.ndarray) -> np.ndarray:
    """Sums of columns [n, k] over all examples, then over each of `DRAWS` resamples, the same for every machine."""
    n, generator = len(columns), np.random.Generator(np.random.PCG64(SEED))
    draws = [np.bincount(generator.integers(0, n, n), minlength=n) @ columns for _ in range(DRAWS)]
    return np.stack([columns.sum(0), *draws])


def _resampled(residuals: np.ndarray, values: np.ndarray, what: str) -> dict[str, Any]:
    """R2, rmse and mae of residuals and values [n, C], each with the deviation and interval of its resamples."""
    n, C = residuals.shape
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # errors of a network that diverged
        sums = _sums(np.concatenate([residuals**2, np.abs(residuals), values, values**2], 1))
        squares, absolute, first, second = (sums[:, C * i : C * (i + 1)] for i in range(4))
        total = second - first**2 / n
        found = {
            "r2": (1 - squares / np.where(total > 1e-12 * second, total, np.nan)).mean(1),
            "rmse": np.sqrt(squares.mean(1) / n),
            "mae": absolute.mean(1) / n,
        }
    return {name: estimate(draws[0], draws[1:], f"{n:,} {what}") for name, draws in found.items()}


def estimate(value: float, draws: np.ndarray, what: str) -> dict[str, Any]:
    """A number with the standard deviation of its resamples, and the interval that holds 95 % of them."""
    known = draws[np.isfinite(draws)]
    usable = np.isfinite(value) and len(known) > 0.9 * len(draws) and known.min() < known.max()
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if usable else (None, None)
    with np.errstate(over="ignore"):
        error = float(known.std()) if usable else None
    entry = number(float(value), error, f"interval from {len(draws):,} resamples of {what}")
    return entry | {"low": finite(low), "high": finite(high)}


def comparisons(predicted: dict[str, np.ndarray], data: Data) -> dict[str, Any]:
    """Mean squared test error of the after kernel's machine minus that of each other, on the same test examples.

    ``of`` is the other's.

    `predicted` holds standardized test predictions [m, C] by "network" and kernel. ``scatter`` are true and predicted
    values of some test examples.
    """
    values = data.y_test.double().cpu().numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        squares = {key: ((p - values) ** 2).mean(1) for key, p in predicted.items()}
    compared = []
    for other in ("init", "conjugate", "network"):
        if other in squares and "after" in squares:
            found = _paired(squares["after"] - squares[other])
            compared.append({"with": other, "of": finite(float(squares[other].mean())), **found})
    return {"compared": compared, "scatter": _scatter(predicted, data), "draws": DRAWS, "ridges": list(RIDGES)}


def _paired(differences: np.ndarray) -> dict[str, Any]:
    """Mean of differences on the same examples, with Student's interval of 95 %; none without any spread."""
    from scipy.stats import t

    n, mean = len(differences), float(differences.mean())
    with np.errstate(invalid="ignore", over="ignore"):
        spread_is_known = n > 1 and (differences.min() < differences.max() or mean == 0)
        error = float(differences.std(ddof=1)) / n**0.5 if spread_is_known else np.nan
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error if n > 1 else np.nan
    entry = number(mean, error, f"Student's interval over {n:,} test examples, in pairs")
    return entry | {"low": finite(mean - half), "high": finite(mean + half)}


def _scatter(predicted: dict[str, np.ndarray], data: Data) -> dict[str, Any]:
    """True and predicted values of some test examples in the targets' units, by target: for the figure."""
    assert data.targets is not None
    rows = spread(len(data.y_test), _DRAWN)
    true = data.targets.in_units(data.y_test.cpu())[rows]
    shown = {key: data.targets.in_units(torch.from_numpy(p))[rows] for key, p in predicted.items()}
    return {
        "test_index": rows.tolist(),
        "targets": [
            {"name": name, "true": true[:, c].tolist()}
            | {key: [finite(value) for value in v[:, c].tolist()] for key, v in shown.items()}
            for c, name in enumerate(data.targets.names)
        ],
    }


def select_examples(task: TrainingTask, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Test examples to look at: half of them with the largest errors, the others spread over the set; predictions."""
    predicted = outputs_of(model, task.data.x_test)
    order = ((predicted - task.data.y_test) ** 2).mean(1).argsort(descending=True, stable=True)
    worst, rest = order[: EXAMPLES // 2], order[EXAMPLES // 2 :].sort().values
    return torch.cat([worst, rest[spread(len(rest), EXAMPLES - len(worst)).to(rest.device)]]), predicted


def distances_of_targets(told: dict[str, Any], data: Data) -> dict[str, Any]:
    """Mean distance of the targets of test examples and their neighbors, by kernel; and of any training examples.

    `told` are the neighbors of `network_measures.neighbors`; distances are Euclidean, of standardized targets.
    """
    y, y_train = data.y_test.double().cpu(), data.y_train.double().cpu()
    tests = [row["test_index"] for row in told["rows"]]
    found: dict[str, Any] = {"any": float(torch.cdist(y[tests], y_train).mean())}
    for key in ("init", "after"):
        apart = [float((y[row["test_index"]] - y_train[n["index"]]).norm()) for row in told["rows"] for n in row[key]]
        found[key] = sum(apart) / len(apart)
    return found

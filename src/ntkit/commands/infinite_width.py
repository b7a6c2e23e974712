"""`ntkit infinite`: how well an infinitely wide network predicts, beside an RBF machine and the trained network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntkit.base.checks import NoLimit, refusal
from ntkit.base.files import ensure_folder, read_json, write_json
from ntkit.base.imports import same_random_numbers
from ntkit.base.memory import free_memory
from ntkit.base.regular_files import check_folder
from ntkit.base.tensors import chosen_device
from ntkit.base.trust import code_of_user
from ntkit.base.versions import versions
from ntkit.commands.network_measures import finite
from ntkit.commands.settings import InfiniteSettings
from ntkit.data import Data
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.machines import KernelRidge
from ntkit.networks.built_in import build
from ntkit.tracking.losses import half_squared
from ntkit.trajectory import train as train_network

_RIDGES = [10.0**k for k in range(-7, 2)]  # relative to the mean diagonal of the kernel
_C, _GAMMA = [1.0, 10.0, 100.0], [0.1, 0.3, 1.0, 3.0]  # of the RBF machine; gamma in units of 1 / (d Var x)
_TUNING = 3  # folds in which the RBF machine is tuned
_ALPHA = [0.001, 0.01, 0.1, 1.0]  # of the RBF machine of a regression
_BATCH, _LR, _MOMENTUM = 32, 0.01, 0.9
_COMPARED = 100  # samples for the distance between the module's own tangent kernel and the limit

Predictor = Callable[[np.ndarray, np.ndarray, bool], np.ndarray]  # (rows to fit, rows to predict, in the test set?)


def infinite(
    settings: InfiniteSettings | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Cross-validated accuracy of the limit's two kernels, of an RBF machine and of the network itself, trained.

    Kernel ridge regression has centered one-hot targets and the ridge of least leave-one-out error; scikit-learn's
    ``SVC(kernel="rbf")`` has the C and gamma of least error in three folds; the network is trained by SGD with momentum
    on the cross-entropy. All see only the examples they are fitted on: for each fold the other folds, for the test set
    all training examples. Of a regression the numbers are R2 (over several targets their mean), the RBF machine is
    kernel ridge regression, and the network's loss is the squared error.

    Parameters
    ----------
    settings : which network and data, and how.
    say : called with each line.

    Returns
    -------
    dict
        ``accuracies`` (per machine: mean over folds, its standard error, on the test set; of a regression ``r2``),
        ``layers``, ``settings``, ``error`` of the kernel, ``distance`` of the module's own tangent kernel from the
        limit.

    Raises
    ------
    Refused
        For a module without a limit (names the layer), a class with fewer examples than folds, or a kernel larger than
        half of the free memory.
    """
    s = settings or InfiniteSettings()
    check_folder(s.out, "--out")
    s.check()
    device = chosen_device(s.device)
    with code_of_user({"--model": s.model, "--data": s.data}):
        sets = s.load_data()
        outputs = len(sets.classes) or sets.outputs
        network = build(s.model, sets.input_shape, outputs, s.seed, sets.tokens).to(device)
    n, m = _check_size(sets, s.folds)
    names = ("model", "data", "train", "test", "folds", "epochs", "w_std", "b_std", "seed")
    values = asdict(s) | {"train": n, "test": m}
    record = {name: values[name] for name in names}
    chosen = {name: values[name] for name in ("classes", "class_names", "task", "target", "resize")}
    chosen["sample"] = s.sample
    record |= {name: list(v) if isinstance(v, tuple) else v for name, v in chosen.items() if v is not None}
    if s.out is not None:
        start = s.out / "run.json"
        old = read_json(start) if start.exists() else {"settings": record}
        if not isinstance(old, dict) or old.get("settings") != record:
            fix = "Name another folder."
            raise refusal("--out", got=f"{s.out}, which holds another run", expected="a new folder", fix=fix)
        write_json(ensure_folder(s.out) / "run.json", {"settings": record, "versions": versions()})
    kernels = {kind: InfiniteKernel(network, kind, s.w_std, s.b_std, sample=s.sample) for kind in ("ntk", "nngp")}
    layers = _layers(kernels["ntk"], sets.x_train[:1].to(device))
    sampled = layers[0].startswith("sampled")
    # random networks are compared in their own precision
    x, x_test = (
        (t if sampled or not t.is_floating_point() else t.double()).to(device) for t in (sets.x_train, sets.x_test)
    )
    for line in layers:
        say(f"  {line}")
    grams: dict[str, tuple[Tensor, Tensor]] = {}
    for kind, kernel in kernels.items():
        say(f"{kind}: {n:,} x {n:,} and {m:,} x {n:,} values")
        grams[kind] = kernel(x).cpu(), kernel(x_test, x).cpu()
    is_regression = sets.targets is not None
    predictors: dict[str, Predictor] = {
        "NTK, kernel ridge": _ridge(*grams["ntk"], sets),
        "NNGP, kernel ridge": _ridge(*grams["nngp"], sets),
        "kernel ridge, RBF" if is_regression else "SVM, RBF": _rbf(sets),
        "the network, trained": _network(network, sets, s.epochs, s.seed, device),
    }
    results = {
        "r2" if is_regression else "accuracies": [
            _scores(name, predictor, sets, s.folds, s.seed, say) for name, predictor in predictors.items()
        ],
        "layers": layers,
        "error": kernels["ntk"].error,
        "distance": None if s.w_std is not None else _distance(network, kernels["ntk"], x[:_COMPARED]),
        "settings": record,
    }
    if s.out is not None:
        write_json(s.out / "results.json", results)
    return results


def _layers(kernel: InfiniteKernel, x: Tensor) -> list[str]:
    """The network as read, one line per layer."""
    try:
        return kernel.describe(x).splitlines()
    except NoLimit as error:
        raise NoLimit(str(error).replace("InfiniteKernel(model, sample=16)", "--sample 16")) from None


def _check_size(sets: Data, folds: int) -> tuple[int, int]:
    """Numbers of training and test examples; refuse sets too large for the memory or too small for the folds."""
    n, m = len(sets.x_train), len(sets.x_test)
    if len(sets.classes) == 1:
        got, fix = f"one class, {sets.classes[0]}", "Add examples of another class."
        raise refusal("--data", got=got, expected="at least two classes", fix=fix)
    if bool((sets.x_train == sets.x_train[:1]).all()):
        got, fix = "training examples that are all the same", "Look for what made them so."
        raise refusal("--data", got=got, expected="examples that differ", fix=fix)
    needed, free = 3 * 8 * n * (n + m), free_memory(torch.device("cpu"))
    if needed > free / 2:
        most = int(math.sqrt(free / 2 / 48))
        expected = f"at most about {most:,} for this memory"
        raise refusal("--train", got=f"{n:,} examples", expected=expected, fix=f"Give --train {most}.")
    smallest = int(sets.y_train.bincount().min()) if sets.targets is None else n // 2
    if smallest < folds:
        what = f"a class with {smallest} examples" if sets.targets is None else f"{n} examples"
        expected = "at least one example per class" if sets.targets is None else "at least two examples"
        got, fix = f"{folds} folds, and {what}", "Use fewer folds."
        raise refusal("--folds", got=got, expected=f"{expected} in every fold", fix=fix)
    if sets.targets is None and (rest := smallest - math.ceil(smallest / folds)) < _TUNING:
        expected = f"{_TUNING}, since the support vector machine is tuned in {_TUNING} folds of these"
        got = f"a class with {rest} examples outside of a fold"
        raise refusal("--train", got=got, expected=expected, fix="Use more training examples.")
    return n, m


def _scores(
    name: str, predictor: Predictor, sets: Data, folds: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Mean accuracy (or R2) over the folds with its standard error, and that on the test set (None without one)."""
    with same_random_numbers():
        from sklearn.model_selection import KFold, StratifiedKFold

    y, y_test, scores = sets.y_train.numpy(), sets.y_test.numpy(), []
    splitter = (StratifiedKFold if sets.targets is None else KFold)(folds, shuffle=True, random_state=seed)
    for i, (fit, rest) in enumerate(splitter.split(np.zeros(len(y)), y)):
        scores.append(_score(predictor(fit, rest, False), y[rest]))
        shown = f"{scores[-1]:.1%}" if sets.targets is None else f"R2 {scores[-1]:.3f}".replace("nan", "undefined")
        say(f"{name}, fold {i + 1} of {folds}: {shown}")
    error = float(np.std(scores, ddof=1) / math.sqrt(folds))
    every = np.arange(len(y))
    on_test = _score(predictor(every, np.arange(len(y_test)), True), y_test) if len(y_test) else None
    return {"name": name, "mean": finite(np.mean(scores)), "error": finite(error), "test": finite(on_test)}


def _score(predicted: np.ndarray, y: np.ndarray) -> float:
    """Share of labels [n] that are right; of targets [n, C] the mean of R2 over them, NaN where one is constant."""
    if y.ndim == 1:
        return float((predicted == y).mean())
    y = y.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # of a network that diverged
        residual, total = ((predicted - y) ** 2).sum(0), ((y - y.mean(0)) ** 2).sum(0)
    total = np.where((y == y[0]).all(0), np.nan, total)
    return float((1 - residual / total).mean())


def _ridge(K: Tensor, K_test: Tensor, sets: Data) -> Predictor:
    """Kernel ridge on centered targets (one-hot for classes), with the ridge of least leave-one-out error."""
    scale, regression = K.diagonal().mean(), sets.targets is not None
    targets = sets.y_train.double() if regression else F.one_hot(sets.y_train, len(sets.classes)).double()

    def predict(fit: np.ndarray, rows: np.ndarray, of_test: bool) -> np.ndarray:
        inner = K[fit][:, fit] / scale
        mean = targets[fit].mean(0)
        machines = [KernelRidge(ridge).fit(inner, targets[fit] - mean) for ridge in _RIDGES]
        solved = [m for m in machines if m.status_ == "solved"]
        best = min(solved, key=lambda m: float((m.loo_**2).mean()))
        outer = (K_test if of_test else K)[rows][:, fit] / scale
        predicted = best.predict(outer) + mean
        return (predicted if regression else predicted.argmax(1)).numpy()

    return predict


def _rbf(sets: Data) -> Predictor:
    """scikit-learn's SVC, or ridge regression, with an RBF kernel, tuned by cross-validation within the rows to fit."""
    with same_random_numbers():
        from sklearn.kernel_ridge import KernelRidge as PlainRidge
        from sklearn.model_selection import GridSearchCV
        from sklearn.svm import SVC

    x, x_test = sets.x_train.flatten(1).double().numpy(), sets.x_test.flatten(1).double().numpy()
    y = sets.y_train.numpy()

    def predict(fit: np.ndarray, rows: np.ndarray, of_test: bool) -> np.ndarray:
        unit = 1 / (x.shape[1] * (x[fit].var() or 1.0))
        gammas = {"gamma": [g * unit for g in _GAMMA]}
        search = GridSearchCV(SVC(kernel="rbf"), {"C": _C} | gammas, cv=_TUNING)
        mean = 0
        if sets.targets is not None:
            search, mean = (
                GridSearchCV(PlainRidge(kernel="rbf"), {"alpha": _ALPHA} | gammas, cv=_TUNING),
                y[fit].mean(0),
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer examples than folds
            search.fit(x[fit], y[fit] - mean)
        return search.predict((x_test if of_test else x)[rows]) + mean

    return predict


def _network(network: nn.Module, sets: Data, epochs: int, seed: int, device: torch.device) -> Predictor:
    """The module trained from its own weights, by SGD with momentum on the cross-entropy, or on the squared error."""
    loss = F.cross_entropy if sets.targets is None else half_squared
    x_train, x_test = (_floats(t).to(device) for t in (sets.x_train, sets.x_test))
    y_train = sets.y_train.to(device)
    start = {name: t.clone() for name, t in network.state_dict().items()}

    def predict(fit: np.ndarray, rows: np.ndarray, of_test: bool) -> np.ndarray:
        network.load_state_dict(start)
        index = torch.from_numpy(fit).to(device)
        steps = epochs * math.ceil(len(fit) / _BATCH)
        data = (x_train[index], y_train[index])
        train_network(
            network, data, loss, lambda p: torch.optim.SGD(p, lr=_LR, momentum=_MOMENTUM), steps,
            batch_size=min(_BATCH, len(fit)), seed=seed,
        )  # fmt: skip
        x = (x_test if of_test else x_train)[torch.from_numpy(rows).to(device)]
        with torch.no_grad():
            out = torch.cat([network(part) for part in x.split(512)])
        network.load_state_dict(start)
        return (out.argmax(1) if sets.targets is None else out).cpu().numpy()

    return predict


def _floats(x: Tensor) -> Tensor:
    """Samples in the network's precision; words stay whole numbers."""
    return x.float() if x.is_floating_point() else x


def _distance(network: nn.Module, limit: InfiniteKernel, x: Tensor) -> float:
    """Relative Frobenius distance of the module's own tangent kernel, at its weights, from the limit."""
    own_x = _floats(x)
    own = TangentKernel(network, outputs="trace")(own_x).double()
    outputs = network(own_x[:1]).shape[1]
    expected = limit(x)
    return float(torch.linalg.norm(own / outputs - expected) / torch.linalg.norm(expected))

"""`ntkit infinite`: how well a network's infinite-width limit classifies, beside an RBF SVM and the trained network."""

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

from ntkit.base.checks import refusal
from ntkit.base.files import ensure_folder, read_json, write_json
from ntkit.base.imports import same_random_numbers
from ntkit.base.memory import free_memory
from ntkit.base.regular_files import check_folder
from ntkit.base.trust import code_of_user
from ntkit.base.versions import versions
from ntkit.commands.settings import InfiniteSettings, check_seed
from ntkit.data import Data
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel
from ntkit.kernels.tangent import TangentKernel
from ntkit.machines import KernelRidge
from ntkit.networks.built_in import build
from ntkit.trajectory import train as train_network

_RIDGES = [10.0**k for k in range(-7, 2)]  # relative to the mean diagonal of the kernel
_C, _GAMMA = [1.0, 10.0, 100.0], [0.1, 0.3, 1.0, 3.0]  # of the RBF machine; gamma in units of 1 / (d Var x)
_BATCH, _LR, _MOMENTUM = 32, 0.01, 0.9
_COMPARED = 100  # samples for the distance between the module's own tangent kernel and the limit

Classifier = Callable[[np.ndarray, np.ndarray, bool], np.ndarray]  # (rows to fit, rows to predict, in the test set?)


def infinite(
    settings: InfiniteSettings | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Cross-validated accuracy of the limit's two kernels, of an RBF machine and of the network itself, trained.

    Kernel ridge regression has centered one-hot targets and the ridge of least leave-one-out error; scikit-learn's
    ``SVC(kernel="rbf")`` has the C and gamma of least error in three folds; the network is trained by SGD with momentum
    on the cross-entropy. All see only the examples they are fitted on: for each fold the other folds, for the test set
    all training examples.

    Parameters
    ----------
    settings : which network and data, and how.
    say : called with each line.

    Returns
    -------
    dict
        ``accuracies`` (per classifier: mean over folds, its standard error, on the test set), ``layers``, ``settings``,
        ``error`` of the kernel, ``distance`` of the module's own tangent kernel from the limit.

    Raises
    ------
    Refused
        For a module without a limit (names the layer), a class with fewer examples than folds, or a kernel larger than
        half of the free memory.
    """
    s = settings or InfiniteSettings()
    check_folder(s.out, "--out")
    if s.folds < 2 or s.epochs < 1:
        got, fix = f"{s.folds}, {s.epochs}", "Give larger numbers."
        raise refusal("--folds, --epochs", got=got, expected="at least 2, at least 1", fix=fix)
    check_seed(s.seed)
    s.check_data()
    if s.w_std == 0:
        raise refusal("--w-std", got=0, expected="more than 0", fix="With weights of 0 all samples are the same.")
    with code_of_user({"--model": s.model, "--data": s.data}):
        sets = s.load_data(s.seed)
        network = build(s.model, sets.input_shape, len(sets.classes), s.seed, sets.tokens)
    n, m = _check_size(sets, s.folds)
    names = ("model", "data", "train", "test", "folds", "epochs", "w_std", "b_std", "seed")
    values = asdict(s) | {"train": n, "test": m}
    record = {name: values[name] for name in names}
    chosen = {name: values[name] for name in ("classes", "class_names", "task", "target", "resize")}
    record |= {name: list(v) if isinstance(v, tuple) else v for name, v in chosen.items() if v is not None}
    if s.out is not None:
        start = s.out / "run.json"
        old = read_json(start) if start.exists() else {"settings": record}
        if not isinstance(old, dict) or old.get("settings") != record:
            fix = "Name another folder."
            raise refusal("--out", got=f"{s.out}, which holds another run", expected="a new folder", fix=fix)
        write_json(ensure_folder(s.out) / "run.json", {"settings": record, "versions": versions()})
    x, x_test = sets.x_train.double(), sets.x_test.double()
    kernels = {kind: InfiniteKernel(network, kind, s.w_std, s.b_std) for kind in ("ntk", "nngp")}
    layers = kernels["ntk"].describe(x[:1]).splitlines()
    for line in layers:
        say(f"  {line}")
    grams: dict[str, tuple[Tensor, Tensor]] = {}
    for kind, kernel in kernels.items():
        say(f"{kind}: {n:,} x {n:,} and {m:,} x {n:,} values")
        grams[kind] = kernel(x), kernel(x_test, x)
    classifiers: dict[str, Classifier] = {
        "NTK, kernel ridge": _ridge(*grams["ntk"], sets),
        "NNGP, kernel ridge": _ridge(*grams["nngp"], sets),
        "SVM, RBF": _rbf(sets),
        "the network, trained": _network(network, sets, s.epochs, s.seed),
    }
    results = {
        "accuracies": [_accuracy(name, c, sets, s.folds, s.seed, say) for name, c in classifiers.items()],
        "layers": layers,
        "error": kernels["ntk"].error,
        "distance": None if s.w_std is not None else _distance(network, kernels["ntk"], x[:_COMPARED]),
        "settings": record,
    }
    if s.out is not None:
        write_json(s.out / "results.json", results)
    return results


def _check_size(sets: Data, folds: int) -> tuple[int, int]:
    """Numbers of training and test examples; refuse sets too large for the memory or too small for the folds."""
    n, m = len(sets.x_train), len(sets.x_test)
    if len(sets.classes) < 2:
        got, fix = f"one class, {sets.classes[0]}", "Add examples of another class."
        raise refusal("--data", got=got, expected="at least two classes", fix=fix)
    needed, free = 3 * 8 * n * (n + m), free_memory(torch.device("cpu"))
    if needed > free / 2:
        most = int(math.sqrt(free / 2 / 48))
        expected = f"at most about {most:,} for this memory"
        raise refusal("--train", got=f"{n:,} examples", expected=expected, fix=f"Give --train {most}.")
    if (smallest := int(sets.y_train.bincount().min())) < folds:
        expected = "at least one example per class in every fold"
        got = f"{folds} folds, and a class with {smallest} examples"
        raise refusal("--folds", got=got, expected=expected, fix="Use fewer folds.")
    return n, m


def _accuracy(
    name: str, classifier: Classifier, sets: Data, folds: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Mean accuracy over the folds with its standard error, and accuracy on the test set (None without one)."""
    with same_random_numbers():
        from sklearn.model_selection import StratifiedKFold

    y, y_test, scores = sets.y_train.numpy(), sets.y_test.numpy(), []
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for i, (fit, rest) in enumerate(splitter.split(np.zeros(len(y)), y)):
        scores.append(float((classifier(fit, rest, False) == y[rest]).mean()))
        say(f"{name}, fold {i + 1} of {folds}: {scores[-1]:.1%}")
    error = float(np.std(scores, ddof=1) / math.sqrt(folds))
    every = np.arange(len(y))
    on_test = float((classifier(every, np.arange(len(y_test)), True) == y_test).mean()) if len(y_test) else None
    return {"name": name, "mean": float(np.mean(scores)), "error": error, "test": on_test}


def _ridge(K: Tensor, K_test: Tensor, sets: Data) -> Classifier:
    """Kernel ridge on centered one-hot targets, with the ridge of least leave-one-out error."""
    scale = K.diagonal().mean()
    targets = F.one_hot(sets.y_train, len(sets.classes)).double()

    def predict(fit: np.ndarray, rows: np.ndarray, of_test: bool) -> np.ndarray:
        inner = K[fit][:, fit] / scale
        mean = targets[fit].mean(0)
        machines = [KernelRidge(ridge).fit(inner, targets[fit] - mean) for ridge in _RIDGES]
        solved = [m for m in machines if m.status_ == "solved"]
        best = min(solved, key=lambda m: float((m.loo_**2).mean()))
        outer = (K_test if of_test else K)[rows][:, fit] / scale
        return (best.predict(outer) + mean).argmax(1).numpy()

    return predict


def _rbf(sets: Data) -> Classifier:
    """scikit-learn's SVC with an RBF kernel, tuned by cross-validation within the rows to fit."""
    with same_random_numbers():
        from sklearn.model_selection import GridSearchCV
        from sklearn.svm import SVC

    x, x_test = sets.x_train.flatten(1).double().numpy(), sets.x_test.flatten(1).double().numpy()
    y = sets.y_train.numpy()

    def predict(fit: np.ndarray, rows: np.ndarray, of_test: bool) -> np.ndarray:
        unit = 1 / (x.shape[1] * x[fit].var())
        search = GridSearchCV(SVC(kernel="rbf"), {"C": _C, "gamma": [g * unit for g in _GAMMA]}, cv=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer examples than folds
            search.fit(x[fit], y[fit])
        return search.predict((x_test if of_test else x)[rows])

    return predict


def _network(network: nn.Module, sets: Data, epochs: int, seed: int) -> Classifier:
    """The module trained from its own weights, by SGD with momentum on the cross-entropy."""
    start = {name: t.clone() for name, t in network.state_dict().items()}

    def predict(fit: np.ndarray, rows: np.ndarray, of_test: bool) -> np.ndarray:
        network.load_state_dict(start)
        index = torch.from_numpy(fit)
        steps = epochs * math.ceil(len(fit) / _BATCH)
        data = (sets.x_train[index].float(), sets.y_train[index])
        train_network(
            network, data, F.cross_entropy, lambda p: torch.optim.SGD(p, lr=_LR, momentum=_MOMENTUM), steps,
            batch_size=min(_BATCH, len(fit)), seed=seed,
        )  # fmt: skip
        x = (sets.x_test if of_test else sets.x_train)[torch.from_numpy(rows)].float()
        with torch.no_grad():
            predicted = torch.cat([network(part).argmax(1) for part in x.split(512)]).numpy()
        network.load_state_dict(start)
        return predicted

    return predict


def _distance(network: nn.Module, limit: InfiniteKernel, x: Tensor) -> float:
    """Relative Frobenius distance of the module's own tangent kernel, at its weights, from the limit."""
    own = TangentKernel(network, outputs="trace")(x.float()).double()
    outputs = network(x[:1].float()).shape[1]
    expected = limit(x)
    return float(torch.linalg.norm(own / outputs - expected) / torch.linalg.norm(expected))

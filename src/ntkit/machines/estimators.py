"""Scikit-learn estimators: an infinitely wide network as a kernel machine for small tables."""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import ndtr
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_is_fitted,
    validate_data,  # pyrefly: ignore[missing-module-attribute]
)
from torch import Tensor, nn

from ntkit.base.checks import nearest, refusal
from ntkit.base.numbers import as_integer, as_number, means_and_deviations
from ntkit.gram.tile_work import device_of
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel, Kind
from ntkit.kernels.kernel import Kernel
from ntkit.machines.gaussian_process import GaussianProcess
from ntkit.machines.ridge import KernelRidge
from ntkit.machines.svm import HardMarginSVM

_CACHE_BYTES = 2**28  # of Gram matrices cached in this process; the least recently used is dropped first
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)  # for E g(z), z standard normal


class _Estimator(BaseEstimator):
    """Parameters, kernel and cache, which regressor and classifier share."""

    _machines: tuple[str, ...] = ("ridge", "gp")
    n_features_in_: int
    machine_: Any
    scale_: float

    def __init__(
        self,
        model: Any = None,
        *,
        depth: int = 3,
        w_std: float | None = 2**0.5,
        b_std: float | None = 0.1,
        kind: Kind = "ntk",
        machine: Literal["ridge", "gp", "svm"] = "ridge",
        ridge: float = 1e-3,
    ):
        self.model = model
        self.depth = depth
        self.w_std = w_std
        self.b_std = b_std
        self.kind = kind
        self.machine = machine
        self.ridge = ridge

    def _start(self, X: np.ndarray) -> Tensor:
        """Check the parameters, store the training set, and return its kernel at unit mean diagonal."""
        if self.machine not in self._machines:
            raise refusal(
                "machine", got=repr(self.machine), expected="a machine", fix=nearest(str(self.machine), self._machines)
            )
        good = lambda r: 0 <= r < float("inf")
        as_number(self.ridge, "ridge", good, "a finite number >= 0", "The default is 0.001.")
        self.X_fit_ = X
        K = self._gram(X)
        self.scale_ = K.diagonal().mean().item()
        if not 0 < self.scale_ < float("inf"):
            raise refusal("X", got=f"a kernel of mean {self.scale_:g}", expected="> 0", fix="Use a b_std above 0.")
        return K / self.scale_

    def _solved(self, machine: Any, good: str) -> Any:
        if machine.status_ != good:
            raise refusal(
                f"{type(self).__name__}(ridge={self.ridge:g})", got=machine.status_, expected=good, fix=machine.advice_
            )
        return machine

    def _test(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=np.float64)

    def _posterior(self, X: np.ndarray, variance: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean [m, C] and standard deviation [m] of the standardized targets."""
        K_test = self._gram(X, self.X_fit_) / self.scale_
        if self.machine == "ridge":
            return self.machine_.predict(K_test).numpy(), None
        prior = None
        if variance:
            kernel = self._kernel()
            prior = kernel.diagonal(_samples(X, kernel)).to("cpu", torch.float64) / self.scale_
        posterior = self.machine_.predict(K_test, prior)
        return posterior.mean.numpy(), posterior.std.numpy() if variance else None

    # ------------------------------------------------------------------ the kernel

    def _network(self) -> nn.Module:
        if self.model is None:
            if self.w_std is None or self.b_std is None:
                fix = "Give both, or a module to read its own initialization."
                raise refusal("w_std, b_std", got="None", expected="numbers, where model=None", fix=fix)
            return _mlp(self.n_features_in_, self.depth)
        model = self.model if isinstance(self.model, nn.Module) else None
        if model is None and callable(self.model):
            with torch.random.fork_rng(
                devices=[]
            ):  # the same weights at every call; the global random state does not change
                torch.default_generator.manual_seed(0)
                model = self.model(self.n_features_in_)
        if not isinstance(model, nn.Module):
            got = type(self.model if model is None else model).__name__
            expected = "None, a torch.nn.Module, a function from n_features to one, or an ntkit kernel"
            raise refusal("model", got=got, expected=expected, fix="Pass one of these.")
        return model

    def _kernel(self) -> Kernel:
        if isinstance(self.model, Kernel):
            return self.model
        network = copy.deepcopy(self._network()).double()  # its limit is computed in its dtype
        return InfiniteKernel(network, kind=self.kind, w_std=self.w_std, b_std=self.b_std)

    def _gram(self, X1: np.ndarray, X2: np.ndarray | None = None) -> Tensor:
        """Kernel values in float64; cached by settings and the bytes of the data."""

        def compute() -> Tensor:
            kernel = self._kernel()
            one, other = (None if X is None else _samples(X, kernel) for X in (X1, X2))
            return kernel(one, other).to(torch.float64).cpu()

        key = None if isinstance(self.model, Kernel) else _identity(self._network())
        if key is None:
            return compute()
        sets = tuple(None if X is None else (X.shape, _digest(X.tobytes())) for X in (X1, X2))
        return _CACHE.get((key, self.kind, self.w_std, self.b_std, sets), compute)


class NTKRegressor(RegressorMixin, _Estimator):
    """Regression with the kernel of an infinitely wide network, for scikit-learn.

    Targets are centered (and for "gp" scaled to unit variance); inputs are taken as they are: put a ``StandardScaler``
    in front where columns have different units.

    Parameters
    ----------
    model : None for a ReLU network with `depth` hidden layers; an ``nn.Module`` that takes [n, n_features] (put
        ``nn.Unflatten(1, (1, 8, 8))`` in front of convolutions); a function from n_features to one; or an ntkit kernel
        of one output on float64 samples (`TangentKernel(model.double(), "trace")`): the next four are then ignored.
    depth : hidden layers, where `model` is None.
    w_std, b_std : of weights and biases in the NTK parametrization, as for `InfiniteKernel` (w_std = sqrt(2) keeps the
        scale of features from layer to layer under ReLU); both None for a module's own initialization.
    kind : "ntk", the kernel of training all layers; "nngp", that of training the last one.
    machine : "ridge" | "gp".
    ridge : relative to the kernel's mean diagonal over the training set, so multiplying the kernel by a number changes
        nothing. For "gp" it is also the variance of the noise, relative to that of the targets.

    Attributes
    ----------
    machine_ : the fitted `ntkit.KernelRidge` or `ntkit.GaussianProcess`, with its residual, on the kernel / `scale_`.
    scale_ : mean diagonal of the training set's kernel.

    Raises
    ------
    Refused
        On fit: an unknown `machine` or `kind`, a `ridge` that is negative or too small for a singular kernel, a model
        without infinite-width limit.

    Notes
    -----
    Arora et al. (2020), "Harnessing the Power of Infinitely Wide Deep Nets on Small-data Tasks". Kernels are cached in
    memory (256 MiB per process), so a search over `ridge` or `machine` computes each fold's once.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> model = NTKRegressor(machine="gp").fit(X, np.sin(3 * X[:, 0]))
    >>> mean, std = model.predict([[0.5], [4.0]], return_std=True)
    >>> bool(abs(mean[0] - np.sin(1.5)) < 0.05), bool(std[1] > 3 * std[0])
    (True, True)
    """

    def fit(self, X: Any, y: Any) -> NTKRegressor:
        """Fit on X, [n, n_features], and y, [n] or [n, C]. Raises `Refused` as the class says."""
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = np.asarray(y, np.float64)
        K = self._start(X)
        self.offset_, spread = (value.numpy()[()] for value in means_and_deviations(torch.tensor(y, device="cpu")))
        self.spread_ = np.where(spread > 0, spread, 1.0)
        machine = KernelRidge(self.ridge) if self.machine == "ridge" else GaussianProcess(self.ridge)
        self.machine_ = self._solved(machine.fit(K, torch.from_numpy((y - self.offset_) / self.spread_)), "solved")
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the predictions, [m] or [m, C]; with `return_std` (machine="gp") also their standard deviations.

        These are of the function itself: a new observation's variance is ``ridge * var(y)`` more.

        Raises
        ------
        Refused
            For `return_std` with machine="ridge".
        """
        X = self._test(X)
        if return_std and self.machine != "gp":
            fix = "Ridge regression has the same mean, and no uncertainty."
            raise refusal("return_std", got=f"machine={self.machine!r}", expected='machine="gp"', fix=fix)
        mean, std = self._posterior(X, return_std)
        mean = self.offset_ + self.spread_ * mean
        if std is None:
            return mean
        return mean, np.multiply.outer(std, self.spread_)

    def __sklearn_tags__(self) -> Any:
        parent: Any = super()  # pyrefly knows an older scikit-learn
        tags = parent.__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _has_probabilities(classifier: NTKClassifier) -> bool:
    """Whether the machine gives probabilities; the error says which one does, as scikit-learn's SVC does."""
    if classifier.machine != "gp":
        got, expected = f"machine={classifier.machine!r}", 'machine="gp"'
        fix = "The others have no probabilities: use predict or decision_function, or set machine='gp'."
        raise AttributeError(str(refusal("predict_proba", got=got, expected=expected, fix=fix)))
    return True


class NTKClassifier(ClassifierMixin, _Estimator):
    """Classification with the kernel of an infinitely wide network, for scikit-learn.

    "ridge" and "gp" are regression on class indicators, less the classes' frequencies; "svm" is one-vs-rest
    `ntkit.HardMarginSVM` on K + ridge I, without bias: that is the soft-margin SVM with squared slacks and
    C = 1/ridge, so `ridge` means one thing for all machines, and the solution is certified.

    Parameters
    ----------
    model : None for a ReLU network with `depth` hidden layers; an ``nn.Module`` that takes [n, n_features] (put
        ``nn.Unflatten(1, (1, 8, 8))`` in front of convolutions); a function from n_features to one; or an ntkit kernel
        of one output on float64 samples (`TangentKernel(model.double(), "trace")`): the next four are then ignored.
    depth : hidden layers, where `model` is None.
    w_std, b_std : of weights and biases in the NTK parametrization, as for `InfiniteKernel` (w_std = sqrt(2) keeps the
        scale of features from layer to layer under ReLU); both None for a module's own initialization.
    kind : "ntk", the kernel of training all layers; "nngp", that of training the last one.
    machine : "ridge" | "gp" | "svm".
    ridge : relative to the kernel's mean diagonal over the training set, so multiplying the kernel by a number changes
        nothing.

    Attributes
    ----------
    classes_ : the distinct labels, sorted.
    machine_ : the fitted machine, with its residual or duality gap, on the kernel / `scale_`.
    scale_ : mean diagonal of the training set's kernel.

    Raises
    ------
    Refused
        On fit: an unknown `machine` or `kind`, fewer than two classes, a `ridge` that is negative or too small for a
        singular kernel or for classes that overlap, a model without infinite-width limit.

    Notes
    -----
    Arora et al. (2020), "Harnessing the Power of Infinitely Wide Deep Nets on Small-data Tasks". Squared slacks as a
    ridge: Cortes and Vapnik (1995), "Support-Vector Networks"; Cristianini and Shawe-Taylor (2000), section 6.1.
    Kernels are cached in memory (256 MiB per process), so a search over `ridge` or `machine` computes each fold's once.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> NTKClassifier(machine="svm").fit(X, ["even", "odd", "odd", "even"]).predict([[0.9, 0.1]]).tolist()
    ['odd']
    """

    _machines = ("ridge", "gp", "svm")

    def fit(self, X: Any, y: Any) -> NTKClassifier:
        """Fit on X, [n, n_features], and labels y, [n]. Raises `Refused` as the class says."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise refusal("y", got=f"one class, {self.classes_[0]}", expected="two or more", fix="Add other points.")
        K = self._start(X)
        if self.machine == "svm":
            K.diagonal().add_(self.ridge)
            self.machine_ = self._solved(HardMarginSVM().fit(K, codes), "optimal")
            return self
        one_hot = np.eye(len(self.classes_))[codes]
        self.offset_ = one_hot.mean(axis=0)
        C = len(self.classes_)
        self.spread_ = (self.offset_ * (1 - self.offset_)).mean() ** 0.5 * (C / (C - 1)) ** 0.5
        machine = KernelRidge(self.ridge) if self.machine == "ridge" else GaussianProcess(self.ridge)
        targets = torch.from_numpy((one_hot - self.offset_) / self.spread_)
        self.machine_ = self._solved(machine.fit(K, targets), "solved")
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return a value per class, [m, C], the largest being that of the label predicted.

        Of two classes, their difference, [m], positive for ``classes_[1]``. For "gp", in units of the standard
        deviation at that point: of two classes, the probability of ``classes_[1]`` is its normal distribution function.
        """
        X = self._test(X)
        if self.machine == "gp":
            scores = self._scores(X)
            return (scores[:, 1] - scores[:, 0]) / 2**0.5 if len(self.classes_) == 2 else scores
        if self.machine == "svm":
            return self.machine_.decision_function(self._gram(X, self.X_fit_) / self.scale_).numpy()
        values = self.offset_ + self.spread_ * self._posterior(X, False)[0]
        return values[:, 1] - values[:, 0] if len(self.classes_) == 2 else values

    def predict(self, X: Any) -> np.ndarray:
        """Return the labels, [m]."""
        values = self.decision_function(X)
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(axis=1)]

    @available_if(_has_probabilities)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Return how probable it is that each class's value is the largest, [m, C]; machine="gp" only.

        The values are a Gaussian process whose sum over the classes is fixed at 1 (prior covariance between classes
        ``spread_^2 (I - 1/C)``), observed as class indicators: least squares, no likelihood of labels. The
        probability is the posterior's own, by Gauss-Hermite quadrature. It is near 1 where the data leave no doubt
        about the function, and near the classes' frequencies' order far from all data; it is not calibrated.
        """
        scores = self._scores(self._test(X))
        probabilities = np.empty_like(scores)
        for c in range(scores.shape[1]):
            ahead = np.delete(scores[:, [c]] - scores, c, axis=1)
            probabilities[:, c] = ndtr(ahead[:, :, None] + _NODES).prod(axis=1) @ _WEIGHTS
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def _scores(self, X: np.ndarray) -> np.ndarray:
        """Values of the classes over their standard deviation, which all share, [m, C]."""
        mean, std = self._posterior(X, True)
        assert std is not None
        return (self.offset_ / self.spread_ + mean) / np.maximum(std, 1e-150)[:, None]


def _samples(X: np.ndarray, kernel: Kernel) -> Tensor:
    """Samples where the kernel's network is."""
    return torch.from_numpy(X.copy()).to(device_of(kernel) or "cpu")


def _mlp(inputs: int, depth: int) -> nn.Module:
    """A ReLU network with `depth` hidden layers; its limit does not depend on its weights and width."""
    depth = as_integer(depth, "depth", "hidden layers, 0 or more", "The default is 3.", least=0)
    sizes = [inputs, *[2] * depth, 1]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layer = nn.utils.skip_init(nn.Linear, a, b)  # draws no random numbers
        layers += [layer.requires_grad_(True), nn.ReLU()]
        for p in layer.parameters():
            nn.init.zeros_(p)
    return nn.Sequential(*layers[:-1])


# ---------------------------------------------------------------------- the cache of kernels


class _TensorCache:
    """Tensors by key, up to a number of bytes; for any number of threads."""

    def __init__(self, limit: int):
        self._limit, self._lock, self._bytes = limit, threading.Lock(), 0
        self._values: OrderedDict[Any, Tensor] = OrderedDict()

    def get(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = compute()  # unlocked: two threads may both do so, and get the same
        with self._lock:
            if key not in self._values and value.nbytes <= self._limit:
                self._values[key] = value
                self._bytes += value.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._values.popitem(last=False)[1].nbytes
        return value


_CACHE = _TensorCache(_CACHE_BYTES)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class _Pickler(pickle.Pickler):
    """Tensors by their values: torch's own pickles of equal tensors differ."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        values = obj.detach().cpu().contiguous()
        content = values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
        # a parameter that is frozen has no share in the kernel
        return str, (f"{values.dtype} {tuple(values.shape)} {obj.requires_grad} {_digest(content)}",)


def _identity(model: nn.Module) -> Any:
    """A key that differs for different models: classes and pickled values; None where a model has no pickle."""
    file = io.BytesIO()
    try:
        _Pickler(file).dump(model)
    except Exception:  # pickling runs the model's own code
        return None
    return tuple(type(m) for m in model.modules()), _digest(file.getvalue())

"""How fast a network's kernel tends to its infinite-width limit: kernels of random wide copies, against the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkit.base.batch import checked
from ntkit.base.caller_context import no_context
from ntkit.base.checks import refusal, undefined
from ntkit.base.numbers import as_integer, as_integers
from ntkit.base.progress import task
from ntkit.base.shown import Shown
from ntkit.jacobian.forwards import inputs_of_last_linear, raw_outputs
from ntkit.jacobian.model_calls import check_module
from ntkit.jacobian.model_outputs import Select, reduce_outputs, selected
from ntkit.kernels.infinite.infinite_kernel import InfiniteKernel, Kind
from ntkit.kernels.tangent import TangentKernel
from ntkit.networks.parametrization import (
    LAYERS,
    factor_of,
    in_ntk_parametrization,
    plain,
    stds,
    to_ntk_parametrization,
)
from ntkit.networks.widening import redraw, reshaped, widened

KINDS = ("ntk", "nngp")
_SEEDS = 100_000  # seeds reserved for each width: no two widths share a network
_AGREES = 3.0  # largest distance of the mean from the limit, in Monte-Carlo errors


@dataclass(frozen=True, eq=False, repr=False)
class MonteCarlo(Shown):
    """Random networks' kernels, entry by entry: see `monte_carlo`.

    Attributes
    ----------
    mean : [n1, n2], float64, the mean over the networks.
    standard_error : [n1, n2], float64, of the mean.
    """

    mean: Tensor
    standard_error: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Convergence(Shown):
    """Kernels of random networks of growing width, against their limit.

    Attributes
    ----------
    kind : "ntk" or "nngp".
    widths, seeds : hidden widths, and networks of each.
    limit : [n, n], the infinite-width kernel.
    mean, standard_error, deviation : [widths, n, n]: mean over the networks, its standard error, their deviation.
    distance : [widths], root mean square over networks of |K - limit| / |limit| (Frobenius).
    distance_error : [widths], standard error of `distance`.
    mean_distance : [widths], |mean - limit| / |limit|.
    mean_error : [widths], the part of it that Monte Carlo explains: the norm of `standard_error` over |limit|.
    slope, slope_error : of log `distance` against log width, weighted by `distance_error`; -1/2 is expected.
    """

    kind: Kind
    widths: tuple[int, ...]
    seeds: int
    limit: Tensor
    mean: Tensor
    standard_error: Tensor
    deviation: Tensor
    distance: Tensor
    distance_error: Tensor
    mean_distance: Tensor
    mean_error: Tensor
    slope: float
    slope_error: float

    @property
    def agrees(self) -> bool:
        """Whether the widest networks' mean lies within three Monte-Carlo errors of the limit."""
        return bool(self.mean_distance[-1] <= _AGREES * self.mean_error[-1])


class Twin:
    """An ordinary network that computes the same as one in the NTK parametrization, with the kernels of that one.

    A parameter's share of the tangent kernel is multiplied by factor^2: no gradient of a scaled weight is formed.
    Gradient descent at learning rate lr becomes lr factor^2 for each parameter.

    Parameters
    ----------
    model : the ordinary network; its weights may change (it may be trained).
    factors : by parameter's name; 1 for those that are missing.
    kind : "ntk" or "nngp".
    """

    def __init__(self, model: nn.Module, factors: dict[str, float], kind: Kind = "ntk") -> None:
        if not isinstance(kind, str) or kind not in KINDS:
            raise refusal("kind", got=repr(kind), expected=" or ".join(KINDS), fix="Choose one.")
        self.model, self.kind, self.factors = model, kind, factors
        self._tangent = TangentKernel(model, outputs="trace")

    @classmethod
    def of(cls, model: nn.Module, kind: Kind = "ntk") -> Twin:
        """Build the twin of a network in the NTK parametrization."""
        factors = {
            f"{name}.{what}" if name else what: factor
            for name, layer in model.named_modules()
            for what in ("weight", "bias")
            if (factor := factor_of(layer, what)) is not None
        }
        return cls(plain(model), factors, kind)

    def sgd(self, lr: float) -> torch.optim.SGD:
        """Gradient descent of the network in the NTK parametrization at this learning rate."""
        groups = [
            {"params": [p], "lr": lr * self.factors.get(name, 1.0) ** 2}
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]
        return torch.optim.SGD(groups, lr=lr)

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        """Kernel per output, as `finite_kernel` says: [n1, n2]."""
        if self.kind == "nngp":
            return self._covariance(x1, x2)
        shares = self._tangent.layers(x1, x2)
        weighted = [share * self.factors.get(name, 1.0) ** 2 for name, share in shares.items()]
        return torch.stack(weighted).sum(0) / reduce_outputs(raw_outputs(self.model, x1[:1]), "full", 1).shape[1]

    def _covariance(self, x1: Tensor, x2: Tensor | None) -> Tensor:
        a1, scale, shift = self._features(x1)
        a2 = a1 if x2 is None else self._features(x2)[0]
        return scale * (a1 @ a2.T) + shift

    def _features(self, x: Tensor) -> tuple[Tensor, float, float]:
        """The inputs of a last dense layer, its w_std^2 / n and b_std^2; without one: the outputs, 1 / C and 0."""
        features, name = inputs_of_last_linear(self.model, x)
        weight = None if name is None else self.factors.get(f"{name}.weight".lstrip("."))
        if weight is not None:
            return features, weight**2, self.factors.get(f"{name}.bias".lstrip("."), 0.0) ** 2
        out = features if name is None else raw_outputs(self.model, x, batch=len(x)).reshape(len(x), -1)
        return out, 1 / out.shape[1], 0.0


def finite_kernel(model: nn.Module, x1: Tensor, x2: Tensor | None = None, kind: Kind = "ntk") -> Tensor:
    """Kernel of one network in the NTK parametrization, per output: [n1, n2] in the network's own dtype.

    "ntk": the tangent kernel's trace over outputs / C. "nngp": sum over outputs of f(x) f(x') / C, whose mean is the
    outputs' covariance; where the outputs are those of a last dense layer, its mean over that layer's weights in closed
    form, w_std^2 <a, a'> / n + b_std^2.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> finite_kernel(to_ntk_parametrization(nn.Linear(2, 3), w_std=1.0, b_std=0.5), x)
    tensor([[0.7500, 0.7500],
            [0.7500, 2.7500]])
    """
    return Twin.of(model, kind)(x1, x2)


def _kernels(
    model: nn.Module, x1: Tensor, x2: Tensor | None, width: int, seeds: Sequence[int], kind: Kind
) -> list[Tensor]:
    """Kernels of wide copies; a model that is not in the NTK parametrization is brought into it with its own stds."""
    ready = model if in_ntk_parametrization(model) else to_ntk_parametrization(model)
    network, recipe = reshaped(ready, width, x1[:2])
    factors = {
        f"{name}.{what}" if name else what: draw.factor
        for (name, what), draw in recipe.items()
        if draw.factor is not None
    }
    twin, kernels = Twin(network, factors, kind), []
    for seed in seeds:
        redraw(network, recipe, seed)
        kernels.append(twin(x1, x2).double())
    return kernels


def _check(model: Any, x: Any, seeds: Any, kind: Any) -> None:
    check_module(model)
    if not isinstance(x, Tensor):
        raise refusal("x", got=type(x).__name__, expected="a tensor, samples first", fix="Pass torch.as_tensor(x).")
    checked(x, "x")
    if not isinstance(kind, str) or kind not in KINDS:
        raise refusal("kind", got=repr(kind), expected=" or ".join(KINDS), fix="Choose one.")
    as_integer(seeds, "seeds", "an integer, at least 2", "One network has no standard error.", least=2)


@no_context()
def monte_carlo(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    width: int,
    seeds: int = 10,
    kind: Kind = "ntk",
    select: Select | None = None,
) -> MonteCarlo:
    """Estimate the infinite-width kernel of a network from random wide copies of it.

    Parameters
    ----------
    model : as `ntkit.widened` takes it; brought into the NTK parametrization first, with its own stds, unless it is.
    x1, x2 : samples [n1, ...], [n2, ...]; ``x2=None`` means the same set.
    width : of all hidden layers.
    seeds : networks, at least 2.
    kind : "ntk" (Theta / C, its trace over the outputs) or "nngp" (the outputs' covariance).
    select : the part of the model's output that is looked at, as for `TangentKernel`.

    Returns
    -------
    MonteCarlo
        Means and standard errors. Beside the error of so many networks the mean has a bias of order 1 / width.

    Raises
    ------
    Refused
        What cannot be widened, by the layer's name; fewer than two seeds; an unknown kind.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> limit = monte_carlo(to_ntk_parametrization(model, w_std=1.0, b_std=0.1), torch.tensor([[1.0, 0.0]]), width=400)
    >>> abs(float(limit.mean) - 0.52) < 5 * float(limit.standard_error)
    True
    """
    _check(model, x1, seeds, kind)
    kernels = torch.stack(_kernels(selected(model, select), x1, x2, width, range(seeds), kind))
    return MonteCarlo(kernels.mean(0), kernels.std(0) / seeds**0.5)


@no_context()
def convergence(
    model: nn.Module,
    x: Tensor,
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    seeds: int = 10,
    kind: Kind = "ntk",
    select: Select | None = None,
) -> Convergence:
    """Measure how fast the kernel of a random network tends to `ntkit.InfiniteKernel` as its width n grows.

    |K_n - K| / |K| falls as n^(-1/2) for a single network. The mean over networks is nearer: its distance is that of
    Monte Carlo, standard error over |K|, and a bias of order 1 / n.

    Parameters
    ----------
    model : as `ntkit.widened` takes it; brought into the NTK parametrization first, with its own stds, unless it is.
        Its weights are not used: the networks, and the limit, have standard normal ones, times each layer's stds.
    x : samples [n, ...].
    widths : at least two.
    seeds : networks of each width, at least 2; no two widths share one.
    kind : "ntk" or "nngp".
    select : the part of the model's output that is looked at, as for `TangentKernel`.

    Returns
    -------
    Convergence

    Raises
    ------
    Refused
        What cannot be widened or has no infinite-width limit, by the layer's name; fewer than two widths or seeds.

    Notes
    -----
    Jacot, Gabriel, Hongler 2018, theorem 1. The rate: Dyer & Gur-Ari 2019, Asymptotics of wide networks.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> rate = convergence(to_ntk_parametrization(model, 1.0, 0.1), torch.eye(2), widths=(32, 512), seeds=10)
    >>> -0.9 < rate.slope < -0.1
    True
    """
    widths = tuple(as_integers(widths, "widths", "a list of positive integers", "Pass [64, 128].", least=1))
    if len(set(widths)) < 2:
        raise refusal("widths", got=repr(widths), expected="two widths or more", fix="A rate needs several.")
    _check(model, x, seeds, kind)
    model = selected(model if in_ntk_parametrization(model) else to_ntk_parametrization(model), select)
    limit = _limit(model, x, max(widths), kind)
    if not bool(limit.any()):
        fix = "Give samples that differ from zero, or biases."
        raise undefined("convergence", got="a limit of zeros", expected="one that differs from zero", fix=fix)
    means, errors, deviations, squares = [], [], [], []
    with task("widths", total=len(widths)) as progress:
        for place, width in enumerate(widths):
            own_seeds = range(_SEEDS * place, _SEEDS * place + seeds)
            kernels = torch.stack(_kernels(model, x, None, width, own_seeds, kind))
            means.append(kernels.mean(0))
            deviations.append(kernels.std(0))
            errors.append(deviations[-1] / seeds**0.5)
            squares.append(((kernels - limit).flatten(1).norm(dim=1) / limit.norm()).square())
            progress.advance(1)
    mean, error, square = torch.stack(means), torch.stack(errors), torch.stack(squares)
    distance = square.mean(1).sqrt()
    distance_error = square.std(1) / seeds**0.5 / (2 * distance)
    slope, slope_error = fitted_slope(widths, distance.tolist(), distance_error.tolist())
    return Convergence(
        kind, widths, seeds, limit, mean, error, torch.stack(deviations), distance, distance_error,
        (mean - limit).flatten(1).norm(dim=1) / limit.norm(), error.flatten(1).norm(dim=1) / limit.norm(),
        slope, slope_error,
    )  # fmt: skip


def _limit(model: nn.Module, x: Tensor, width: int, kind: Kind) -> Tensor:
    """Limit of networks with standard normal parameters and the model's own w_std and b_std."""
    layers = [stds(layer) for layer in model.modules() if isinstance(layer, LAYERS)]
    w_stds, b_stds = ({float(f"{v:.12g}") for v in of if v is not None} for of in zip(*layers, strict=True))  # rounded
    if len(w_stds) == 1 and len(b_stds) <= 1:
        kernel = InfiniteKernel(plain(model), kind=kind, w_std=w_stds.pop(), b_std=b_stds.pop() if b_stds else 0.0)
    else:  # each layer has its own: they are read off a wide network
        kernel = InfiniteKernel(widened(model, width, x[:2]), kind=kind)
    return kernel(x).double()


def fitted_slope(x: Sequence[float], y: Sequence[float], error: Sequence[float]) -> tuple[float, float]:
    """Slope of log y against log x, weighted by the standard errors of y, and its standard error.

    >>> slope, error = fitted_slope([1, 10, 100], [3.0, 0.3, 0.03], [0.03, 0.003, 0.0003])
    >>> round(slope, 9), round(error, 4)
    (-1.0, 0.0031)
    """
    if not (min(y) > 0 and min(error) > 0):
        got, expected = f"{min(y):.3g} ± {min(error):.3g}", "values and standard errors above zero"
        fix = "A network without hidden weights has its limit at every width."
        raise undefined("slope", got=got, expected=expected, fix=fix)
    a, b = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    weight = (np.asarray(y) / np.asarray(error)) ** 2
    centered = a - (weight * a).sum() / weight.sum()
    spread = (weight * centered**2).sum()
    return float((weight * centered * b).sum() / spread), float(spread**-0.5)

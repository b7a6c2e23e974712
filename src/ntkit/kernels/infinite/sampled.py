"""The limit by Monte Carlo, where it has no closed form: kernels of random larger copies of the network, averaged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.checks import refusal
from ntkit.base.numbers import as_integer
from ntkit.base.progress import task
from ntkit.base.shown import Shown
from ntkit.jacobian.forwards import inputs_of_last_linear, raw_outputs
from ntkit.kernels.tangent import TangentKernel
from ntkit.networks.larger_copies import LargerCopy, Make, hidden_width, larger_copy

_WIDTH = 256  # features of the narrowest hidden layer of the larger copies
_ERRORS = 3.0  # a bias of more standard errors than this is reported
_SEEDS = 100_000  # seeds kept for each width: no two widths share a network


@dataclass(frozen=True, eq=False, repr=False)
class LimitEstimate(Shown):
    """A limit estimated from random networks, entry by entry: [n1, n2] each. See `InfiniteKernel.estimate`.

    Attributes
    ----------
    mean, standard_error : over the networks.
    bias : mean of the networks minus that of networks half as wide; what is left of it is of the same size or smaller.
    bias_error : its standard error.
    """

    mean: Tensor
    standard_error: Tensor
    bias: Tensor
    bias_error: Tensor

    @property
    def error(self) -> float:
        """Standard error over the mean, both as Frobenius norms."""
        return float(self.standard_error.norm() / self.mean.norm())

    @property
    def biased(self) -> bool:
        """Whether the widths differ by more than three standard errors, over all entries."""
        return bool(self.bias.norm() > _ERRORS * self.bias_error.norm())


class Sampling:
    """How a kernel samples its limit, and what it has sampled.

    limits : by dtype and shape of the samples, w_std and b_std.
    error : of the latest estimate.
    """

    def __init__(self, kind: str, networks: int, make: Make | None) -> None:
        self.kind, self.networks, self.make = kind, networks, make
        self.limits: dict[tuple[Any, ...], SampledLimit] = {}
        self.error = 0.0

    @classmethod
    def of(cls, kind: str, sample: int | None, make: Make | None) -> Sampling | None:
        """Check the arguments `sample` and `make` of a kernel; None where nothing is to be sampled."""
        if sample is not None:
            fix = "One network has no standard error; 16 are a start."
            sample = as_integer(sample, "sample", "a number of networks, at least 2", fix, least=2)
        if make is not None and (sample is None or not callable(make)):
            fix = "Pass sample=16, too." if callable(make) else "Pass a function."
            raise refusal("make", got=repr(make)[:80], expected="a function of the factor, with sample=", fix=fix)
        return None if sample is None else cls(kind, sample, make)

    def limit(self, model: nn.Module, x: Tensor, stds: tuple[float, float] | None = None) -> SampledLimit:
        """The networks for samples like these, with w_std and b_std if they are given."""
        key = (x.dtype, tuple(x.shape[1:]), stds)
        if key not in self.limits:
            self.limits[key] = SampledLimit(self, model, torch.cat([x[:1], x[-1:], x[:1]]).detach(), stds)
        return self.limits[key]

    def reported(self, estimate: LimitEstimate) -> LimitEstimate:
        """Keep the error, and warn of a bias."""
        self.error = estimate.error
        if estimate.biased:
            size = float(estimate.bias.norm() / estimate.mean.norm())
            warnings.warn(
                f"The mean of the sampled networks differs by {size:.1%} from that of networks half as wide, more than "
                "three standard errors: the limit may differ by as much. kernel.estimate(x) shows it for each entry.",
                stacklevel=6,
            )
        return estimate


class SampledLimit:
    """Kernels of random copies of a model with all hidden widths multiplied by a factor, and half of that.

    example : three samples.
    """

    def __init__(self, sampling: Sampling, model: nn.Module, example: Tensor, stds: tuple[float, float] | None) -> None:
        self._sampling, self.networks = sampling, sampling.networks
        narrowest = hidden_width(model, example)
        self.factor = 2 ** max(1, math.ceil(math.log2(_WIDTH / narrowest)))
        if sampling.make is None:
            larger_copy(model, 2, example, stds)  # refuse before large copies take memory
        self.copies = [larger_copy(model, f, example, stds, sampling.make) for f in (self.factor // 2, self.factor)]
        self._kernels = [WeightedKernel(larger, sampling.kind, example) for larger in self.copies]

    def describe(self) -> list[str]:
        """One line per parameter, and what grew beside the layers."""
        larger = self.copies[-1]
        half = self.factor // 2
        lines = [
            f"sampled: mean of {self.networks} random networks with hidden widths times {self.factor}; "
            f"as many times {half} show the bias"
        ]
        for number in larger.grown:
            where = f"layer '{number.module}'" if number.module else "the model"
            power = "the factor" if number.power == 1 else f"the factor to the power {number.power:g}"
            lines.append(f"{where}: '{number.attribute}' grows with {power}")
        for name, p in larger.network.named_parameters():
            law = larger.laws[name]
            text = f"std {law.std:.4g}" if law.std else f"{law.mean:g}"
            lines.append(f"parameter '{name}': {text}, shape {tuple(p.shape)}")
        return lines

    def gram(self, x1: Any, x2: Any | None) -> LimitEstimate:
        """Estimates of k(x1, x2)."""
        x2 = None if x2 is None else x2.to(x1.dtype)
        return self._estimate(lambda kernel: kernel.gram(x1, x2))

    def pairs(self, x1: Any, x2: Any | None) -> LimitEstimate:
        """Estimates of k(x1_i, x2_i), [n] each."""
        x2 = None if x2 is None else x2.to(x1.dtype)
        return self._estimate(lambda kernel: kernel.pairs(x1, x2))

    def _estimate(self, values: Callable[[WeightedKernel], Tensor]) -> LimitEstimate:
        means, variances = [], []
        # the time of a network grows with the square of its width
        with task("networks of the limit", 5 * self.networks) as progress:
            for place, (larger, kernel) in enumerate(zip(self.copies, self._kernels, strict=True)):
                sums: list[Tensor] = []
                for seed in range(self.networks):
                    larger.draw(_SEEDS * place + seed)
                    value = values(kernel).double()
                    sums = sums or [torch.zeros_like(value), torch.zeros_like(value), value]
                    away = value - sums[2]  # from the first: little cancels
                    sums[0] += away
                    sums[1] += away.square()
                    progress.advance(4 if place else 1)
                mean = sums[0] / self.networks
                means.append(sums[2] + mean)
                variances.append((sums[1] / self.networks - mean.square()).clamp(min=0) / (self.networks - 1))
        bias_error = (variances[0] + variances[1]).sqrt()
        estimate = LimitEstimate(means[1], variances[1].sqrt(), means[1] - means[0], bias_error)
        return self._sampling.reported(estimate)


def _used(network: nn.Module, trained: dict[str, nn.Parameter], example: Tensor) -> list[str]:
    """Names of the parameters on which the outputs depend: a forward may leave out a layer."""
    with torch.enable_grad():
        out = network(example).sum()
    if not trained or not out.requires_grad:
        return list(trained)
    gradients = torch.autograd.grad(out, list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None]


class WeightedKernel:
    """Kernel of one network per output, the gradients of each parameter multiplied by its factor."""

    def __init__(self, larger: LargerCopy, kind: str, example: Tensor) -> None:
        self._network, self._laws, self._kind = larger.network, larger.laws, kind
        by_factor: dict[float, list[str]] = {}
        trained = {name: p for name, p in larger.network.named_parameters() if p.requires_grad}
        for name in _used(larger.network, trained, example):
            if larger.laws[name].factor:
                by_factor.setdefault(larger.laws[name].factor, []).append(name)
        self._parts = [(f**2, TangentKernel(larger.network, "trace", params=names)) for f, names in by_factor.items()]

    def gram(self, x1: Any, x2: Any | None) -> Tensor:
        """Values for all pairs, [n1, n2]."""
        if self._kind == "nngp":
            first = self._features(x1)
            second = first if x2 is None else self._features(x2)
            return sum((a @ b.T for a, b in zip(first, second, strict=True)), torch.zeros(()))
        shape = (len(x1), len(x1 if x2 is None else x2))
        return self._sum(lambda kernel: kernel(x1, x2), x1, shape)

    def pairs(self, x1: Any, x2: Any | None) -> Tensor:
        """Values for sample i with sample i, [n]."""
        if self._kind == "nngp":
            first = self._features(x1)
            second = first if x2 is None else self._features(x2)
            return sum(((a * b).sum(1) for a, b in zip(first, second, strict=True)), torch.zeros(()))
        return self._sum(lambda kernel: kernel.diagonal(x1) if x2 is None else kernel.paired(x1, x2), x1, (len(x1),))

    def _sum(self, values: Callable[[TangentKernel], Tensor], x: Any, shape: tuple[int, ...]) -> Tensor:
        outputs = raw_outputs(self._network, x[:1]).reshape(1, -1).shape[1]
        total = torch.zeros(shape, dtype=torch.float64, device=x.device)
        for weight, kernel in self._parts:
            total.add_(values(kernel).double(), alpha=weight / outputs)
        return total

    def _features(self, x: Any) -> list[Tensor]:
        """Factors whose products add up to the outputs' covariance: over a last linear layer its mean is known."""
        features, name = inputs_of_last_linear(self._network, x)
        if name is None:
            return [features.double() / math.sqrt(features.shape[1])]
        weight, bias = (self._laws.get(f"{name}.{what}".lstrip(".")) for what in ("weight", "bias"))
        assert weight is not None
        constant = features.new_full((len(features), 1), 0.0 if bias is None else bias.std)
        return [features.double() * weight.std, constant.double()]

"""The influence kernel: the tangent kernel with the curvature of the training loss filtered out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count, has_infinity, take
from ntkit.base.caller_context import own_context
from ntkit.base.checks import Refused, refusal
from ntkit.base.memory import free_memory, parse_memory
from ntkit.base.shown import of_model
from ntkit.base.tensors import tensor_hash
from ntkit.jacobian.engine import Engine
from ntkit.jacobian.model_calls import Outputs, Params, call, untouched
from ntkit.jacobian.model_outputs import Select, part_of, picked, reduce_outputs, refuse_infinite_input
from ntkit.kernels.curvature import SpectralFilter, gauss_newton, hessian, jacobian_rows, leading_eigenpairs
from ntkit.kernels.kernel import Kernel, KernelOperator, mirrored, written
from ntkit.kernels.output_loss import OutputLoss, model_outputs
from ntkit.kernels.tangent import TangentKernel
from ntkit.trajectory import Trajectory
from ntkit.trajectory.learning_rates import flow_time
from ntkit.trajectory.objective import Inputs, Loss, Objective

_CHECKED = 8  # training examples on which the error is measured
_EXACT = 6000  # rows of a matrix that is decomposed as a whole: minutes on one core
_FIRST, _MOST, _ENOUGH = 32, 1024, 1e-3  # leading eigenpairs: those tried first, at most, and the error that is enough


class InfluenceKernel(Kernel):
    r"""k(x, z) = J(x) F(C) J(z)^T, J(x) = d f(x) / d parameters [C, P], C the curvature of the mean training loss.

    .. math:: C = \tfrac1n \sum_i J_i^\top D_i J_i \;\text{(Gauss-Newton; D the loss's Hessian by the outputs), or the
        Hessian}, \qquad F(\lambda) = \frac{1 - e^{-T\lambda}}{\lambda} \;\text{or}\; \frac{1}{\lambda + \delta}

    With the slopes of the loss, -k(x, x_i) d loss_i / d f(x_i) / n is what the output for x gains, to first order, when
    the weight of example i rises by one: the influence function. The first filter is that of gradient flow of length T
    on a model that is linear in its parameters: it has no damping to choose. All sums are in float64 [n1, n2, C, C], or
    [n1, n2] for a callable; J in the precision of the network, so convert network and data to float64 for a large T or
    a small damping: see `certificate`.

    Parameters
    ----------
    model : any ``nn.Module`` in eval mode, at its current parameters.
    data : (x, y), the n training examples.
    loss : ``loss(model(x), y)`` -> scalar, the mean (or the sum) of one loss per example.
    curvature : "gauss-newton", positive semidefinite for a convex loss; or "hessian", with P backward passes.
    damping : delta > 0, in the units of the curvature.
    time : T, the sum of the learning rates of a run; or an `ntkit.Trajectory` trained by SGD, for that sum times
        (1 - dampening) / (1 - momentum). Exactly one of `damping` and `time`.
    outputs : "full", or a callable from the outputs on a batch to one scalar per sample [n].
    params : parameter names, a predicate, or None for all that require grad.
    memory : bytes of scratch memory (or text such as "2 GB"); half of what is free if None.
    select : the part of the model's output that f and the loss are of, as for `ntkit.TangentKernel`.

    Raises
    ------
    Refused
        As `ntkit.TangentKernel`; for a loss that mixes examples or, under "gauss-newton", is not convex; at the first
        use, when neither the [n C, n C] nor the [P, P] matrix fits into memory, when C + damping is not positive
        definite (with the damping needed), and when the filter leaves nothing but rounding.

    Notes
    -----
    Koh, Liang 2017, section 2.1 (influence function); Tsai, Yeh, Ravikumar 2023 (as a kernel). The matrix
    decomposed is the smaller one: [n C, n C] by the Woodbury identity, or [P, P]. Of a Gauss-Newton matrix that has
    more than 6,000 rows, or does not fit into memory, up to 1,024 leading eigenpairs are computed, until the error is
    1e-3; the others count as zero.

    Examples
    --------
    One example with curvature 1, and as much damping, halve the tangent kernel:

    >>> x = torch.ones(1, 1, dtype=torch.float64)
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> half_square = lambda out, y: ((out - y) ** 2).mean() / 2
    >>> InfluenceKernel(model, (x, 0 * x), half_square, damping=1.0)(x)
    tensor([[[[0.5000]]]], dtype=torch.float64)
    """

    _infinite = True

    def __init__(
        self,
        model: nn.Module,
        data: tuple[Inputs, Tensor],
        loss: Loss,
        *,
        curvature: Literal["gauss-newton", "hessian"] = "gauss-newton",
        damping: float | None = None,
        time: float | Trajectory | None = None,
        outputs: Outputs = "full",
        params: Params = None,
        memory: int | str | None = None,
        select: Select | None = None,
    ) -> None:
        if curvature not in ("gauss-newton", "hessian"):
            fix = "Choose one of the two."
            raise refusal("curvature", got=repr(curvature), expected='"gauss-newton" or "hessian"', fix=fix)
        if not callable(outputs) and (not isinstance(outputs, str) or outputs != "full"):
            fix = "Pick one scalar by a callable: lambda y: y[:, 0]."
            raise refusal("outputs", got=repr(outputs), expected='"full" or a callable', fix=fix)
        self._filter = SpectralFilter(damping, flow_time(time) if isinstance(time, Trajectory) else time)
        self._curvature, self._loss = curvature, loss
        self._outputs: Outputs = outputs
        self._engine = Engine(model, outputs, params, memory, select=select)
        full = outputs == "full"
        self._full = self._engine if full else Engine(model, "full", params, memory, select=select)
        self._tangent = TangentKernel(model, outputs, params=params, memory=memory, select=select)
        self._tangent_full = (
            self._tangent if full else TangentKernel(model, "full", params=params, memory=memory, select=select)
        )
        self._objective, self._budget = Objective(data, loss), parse_memory(memory)
        self._factor: Tensor | None = None  # k = base Theta + sign G G^T, G = J(x) or K(x, X) times this factor
        self._certificate: dict[str, Any] = {}
        self._computed_at = ""

    def __repr__(self) -> str:
        engine = self._engine
        return of_model(type(self), engine.model, engine.params, curvature=self._curvature, outputs=engine.outputs)

    @property
    @own_context()
    def certificate(self) -> dict[str, Any]:
        """How it was computed, as plain JSON.

        route ("samples" or "parameters"), smallest and largest eigenvalue of the curvature that were found, at_zero
        (F(0): T, or 1 / damping), and error: by samples, how far the kernel misses J F(C) J^T on a few training
        examples, where the decomposition gives it without subtraction; by parameters, the residual of the
        decomposition; both relative. Where only leading eigenpairs were computed (their number is ``eigenpairs``), the
        error is a bound on what the others change of k(x, x) on a few training examples, over the largest k(x, x).
        """
        self._refresh()
        return dict(self._certificate)

    def settings(self) -> dict[str, Any]:
        """Model, outputs, parameters, training data (their hash), loss, curvature and filter."""
        loss: Any = self._loss
        return {
            **self._engine.settings(),
            "data": self._objective.data_hash(),
            "loss": loss,
            "curvature": self._curvature,
            "damping": self._filter.damping,
            "time": self._filter.time,
        }

    @own_context()
    def operator(self, x: Batch) -> KernelOperator:
        """Matrix-free k(x): products with the features of the curvature, and with the tangent kernel."""
        x = self._checked(x, "x")
        features = self._finite(self._features(x), x)
        flat, base, sign = features.flatten(0, -2), self._base(), self._sign()
        tangent = self._tangent.operator(x) if base else None

        def apply(v: Tensor) -> Tensor:
            values = sign * (flat @ (flat.T @ v))
            return values if tangent is None else values + base * (tangent @ v).to(torch.float64)

        def diagonal() -> Tensor:
            values = sign * flat.square().sum(1)
            return values if tangent is None else values + base * tangent.diagonal().to(torch.float64)

        return KernelOperator(len(flat), apply, diagonal, flat)

    # ------------------------------------------------------------------ values

    def _gram(self, x1: Batch, x2: Batch | None, out: Tensor | None) -> Tensor:
        left = self._features(x1)
        right = left if x2 is None else self._features(x2)
        values = self._sign() * (left.flatten(0, -2) @ right.flatten(0, -2).T)
        if left.ndim == 3:
            values = values.view(*left.shape[:2], *right.shape[:2]).transpose(1, 2).contiguous()
        if base := self._base():
            values += base * self._tangent(x1, x2).to(torch.float64)
        if x2 is None:
            values = mirrored(values) if values.ndim == 2 else (values + values.permute(1, 0, 3, 2)) / 2
        return written(values, out)

    def _pairs(self, x1: Batch, x2: Batch | None) -> Tensor:
        left = self._features(x1)
        right = left if x2 is None else self._features(x2)
        if left.ndim == 3:
            values = self._sign() * (left @ right.transpose(1, 2))
        else:
            values = self._sign() * (left * right).sum(1)
        if base := self._base():
            own = self._tangent.diagonal(x1) if x2 is None else self._tangent.paired(x1, x2)
            values = values + base * own.to(torch.float64)  # before the product: half precision ends at 65504
        return values

    def _base(self) -> float:
        """The factor of the tangent kernel itself; after `_refresh`."""
        return self._filter.at_zero if self._certificate["route"] == "samples" else 0.0

    def _sign(self) -> float:
        return -1.0 if self._certificate["route"] == "samples" else 1.0

    def _features(self, x: Batch) -> Tensor:
        """G(x), [m, C, q], or [m, q] for a callable: its products are what the filter changes."""
        factor = self._refresh()
        by_samples = self._certificate["route"] == "samples"
        per_sample = 8 * self._full.structure(x).outputs * (2 * len(factor) if by_samples else len(factor) + 1)
        step, parts = max(1, int(0.25 * self._memory() / per_sample)), []
        for start in range(0, count(x), step):
            part = take(x, slice(start, start + step))
            parts.append(self._by_samples(part, factor) if by_samples else self._by_parameters(part, factor))
        features = torch.cat(parts)
        return features[:, 0] if callable(self._outputs) else features

    def _by_parameters(self, x: Batch, factor: Tensor) -> Tensor:
        return jacobian_rows(self._engine, x).to(torch.float64) @ factor

    def _by_samples(self, x: Batch, factor: Tensor) -> Tensor:
        cross = self._tangent_full(x, self._objective.x).transpose(1, 2).flatten(2).to(torch.float64)
        if callable(self._outputs):
            cross = self._slopes_of_outputs(x)[:, None].to(torch.float64) @ cross
        return cross @ factor

    def _slopes_of_outputs(self, x: Batch) -> Tensor:
        """D outputs(f(x)) / d f(x), [m, C], for outputs given by a callable."""
        engine = self._full
        with untouched(engine.model, engine.params):
            raw = picked(call(engine.model, x), engine.select)
            if isinstance(raw, Tensor):
                raw = raw.detach().requires_grad_()
            f, params = part_of(raw), [*engine.params.values()]
            scalar = reduce_outputs(raw, self._outputs, count(x)).sum()
            again = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            (slope,) = torch.autograd.grad(scalar, f, **again)
            if raw is not f:  # an object: a callable may look at more than its logits
                whole, through = (torch.autograd.grad(*of, **again) for of in ((scalar, params), (f, params, slope)))
                _refuse_other_parts(whole, through)
        return slope.reshape(len(slope), -1)

    # ------------------------------------------------------------------ the curvature

    def _refresh(self) -> Tensor:
        """The factor of G, computed again after the model's parameters have changed."""
        self._engine.refresh()
        self._full.refresh()
        now = tensor_hash(dict(self._engine.model.state_dict(keep_vars=False)))
        if self._factor is None or now != self._computed_at:
            self._factor = self._decompose()
            self._computed_at = now
        return self._factor

    def _decompose(self) -> Tensor:
        x, y = self._objective.x, self._objective.y
        own = OutputLoss(self._loss, model_outputs(self._engine.model, x, self._engine.select), y)
        samples, P = own.n * own.C, sum(p.numel() for p in self._full.params.values())
        needed = {"samples": 40 * samples**2, "parameters": 32 * P**2}  # copies of a float64 matrix, and of its parts
        if self._curvature == "hessian":
            needed.pop("samples")
        route = min(needed, key=lambda name: needed[name])
        allowed, rows = self._memory(), samples if route == "samples" else P
        by_parts = self._curvature != "hessian" and (rows > _EXACT or needed[route] > allowed)
        if by_parts and allowed > 16 * _FIRST * samples:
            return self._from_leading(own, min(_MOST, samples - 1, int(allowed / (16 * samples))))
        if needed[route] > allowed:
            small = f"; {own.n} examples x {own.C} outputs" if "samples" in needed else ""
            fix = "Allow more memory=, select fewer parameters (params=)"
            raise refusal(
                "the curvature", got=f"{P} parameters{small}: {needed[route] / 1e9:.3g} GB",
                expected=f"at most {allowed / 1e9:.3g} GB",
                fix=fix + (', or use curvature="gauss-newton".' if not small else ", or use fewer training examples."),
            )  # fmt: skip
        if route == "samples":
            return self._in_sample_space(own)
        if self._curvature == "hessian":
            full = self._full
            matrix = hessian(full.model, full.params, x, y, self._loss, own.of_mean, full.select)
        else:
            self._roots(own)  # refuses a loss that is not convex
            matrix = gauss_newton(self._full, x, own.curvature())
        if has_infinity(x) and not bool(torch.isfinite(matrix).all()):
            raise refuse_infinite_input()
        return self._in_parameter_space(matrix)

    def _in_parameter_space(self, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        if self._curvature == "gauss-newton":
            values = values.clamp(min=0)
        lowest, scale = float(values[0]), float(values.abs().max()) or 1.0
        damping, rounding = self._filter.damping, len(values) * torch.finfo(torch.float64).eps * scale
        if damping is not None and not lowest + damping > rounding:
            raise refusal(
                "damping", got=f"{damping:g}, with a smallest eigenvalue of the Hessian of {lowest:.6g}",
                expected=f"more than {(rounding - lowest) * (1 + 1e-5):.6g}, or Hessian + damping is not definite",
                fix='Use such a damping, time=..., or curvature="gauss-newton".',
            )  # fmt: skip
        filtered = self._filter.values(values)
        if not bool(filtered.isfinite().all()):
            raise refusal(
                "time", got=f"{self._filter.time:g}, with a smallest eigenvalue of the Hessian of {lowest:.6g}",
                expected="a time over which the flow stays finite",
                fix='Use a shorter time, damping=..., or curvature="gauss-newton".',
            )  # fmt: skip
        residual = float((matrix @ vectors - vectors * values).norm()) / scale
        self._report("parameters", values, residual)
        return vectors * filtered.sqrt()

    def _in_sample_space(self, own: OutputLoss) -> Tensor:
        """R U sqrt((F(0) - F(l)) / (n l)), with D = R R^T and R^T Theta R / n = U l U^T."""
        n, C = own.n, own.C
        roots = self._roots(own)
        theta = self._tangent_full(self._objective.x).to(torch.float64)  # [n, n, C, C]
        half = torch.einsum("ijcd,jde->icje", theta, roots).reshape(n * C, n * C)  # Theta R
        inner = (roots.transpose(1, 2) @ half.view(n, C, n * C)).view(n * C, n * C) / n
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        values = values.clamp(min=0)
        weights = (self._filter.missing(values) / n).sqrt()
        few = slice(0, min(_CHECKED, n) * C)
        exact = (vectors[few] * values * self._filter.values(values)) @ vectors[few].T
        features = n * (inner[few] @ vectors) * weights  # R^T G of these examples
        found = self._filter.at_zero * inner[few, few] - features @ features.T / n
        scale = float(exact.abs().max()) or 1.0
        error = float((found - exact).abs().max()) / scale
        if not error < 1:
            raise self._nothing_left(error)
        self._report("samples", values, error)
        return (roots @ vectors.view(n, C, n * C)).view(n * C, n * C) * weights

    def _from_leading(self, own: OutputLoss, most: int) -> Tensor:
        """The factor by samples from leading eigenpairs, as many as the error asks for; the others count as zero."""
        n, C = own.n, own.C
        roots, k, few = self._roots(own), _FIRST, torch.linspace(0, n - 1, min(n, _CHECKED)).long().unique()
        operator, x = self._tangent_full.operator(self._objective.x), take(self._objective.x, few)
        cross = self._tangent_full(x, self._objective.x).transpose(1, 2).flatten(2).to(torch.float64)
        own_values = self._tangent_full.diagonal(x).diagonal(dim1=1, dim2=2).to(torch.float64)

        def product(v: Tensor) -> Tensor:
            image = (operator @ (roots @ v.view(n, C, -1)).view(n * C, -1)).to(torch.float64)
            return (roots.transpose(1, 2) @ image.view(n, C, -1)).view(n * C, -1) / n

        while True:
            values, vectors = leading_eigenpairs(product, n * C, min(k, most), self._full.like)
            missing = self._filter.missing(values)
            factor = (roots @ vectors.view(n, C, -1)).view(n * C, -1) * (missing / n).sqrt()
            features = (cross @ factor).square()
            rest = (own_values - (features / (missing * values)).sum(2)).clamp(min=0)  # what no leading pair sees
            kept = (self._filter.at_zero * own_values - features.sum(2)).max()
            unseen = self._filter.at_zero - float(self._filter.values(values[:1]))
            error = float(unseen * rest.max() / kept) if bool(rest.any()) else 0.0
            if error <= _ENOUGH or len(values) < k or k >= most:
                self._report("samples", values, error)
                self._certificate["eigenpairs"] = len(values)
                return factor
            k *= 2

    def _nothing_left(self, error: float) -> Refused:
        """The refusal of a filter that leaves less of the tangent kernel than its rounding."""
        name, value = next((n, v) for n in ("damping", "time") if (v := getattr(self._filter, n)) is not None)
        fix = "Use a larger damping" if name == "damping" else "Use a shorter time"
        fix += "." if self._full.dtype == torch.float64 else ", or network and data in float64."
        got = f"{value:g}, at which rounding alone is {error:.2g} times the kernel"
        return refusal(name, got=got, expected="one that leaves more than rounding of the tangent kernel", fix=fix)

    @staticmethod
    def _roots(own: OutputLoss) -> Tensor:
        """R_i with D_i = R_i R_i^T, [n, C, C]."""
        values, vectors = torch.linalg.eigh(own.curvature())
        worst = int(values[:, 0].argmin())
        if values[worst, 0] < -max(1e-6, 4 * own.eps) * values.abs().max():  # more than rounding, in half precision too
            raise refusal(
                "loss", got=f"a second derivative of {float(values[worst, 0]):.3g} by the outputs of example {worst}",
                expected="a loss that is convex in the outputs", fix='Use curvature="hessian".',
            )  # fmt: skip
        return vectors * values.clamp(min=0).sqrt()[:, None, :]

    def _report(self, route: str, values: Tensor, error: float) -> None:
        self._certificate = {
            "route": route,
            "smallest_eigenvalue": float(values[0]),
            "largest_eigenvalue": float(values[-1]),
            "at_zero": self._filter.at_zero,
            "error": error,
        }

    def _memory(self) -> int:
        return self._budget if self._budget is not None else free_memory(self._engine.like.device) // 2


def _refuse_other_parts(whole: Sequence[Tensor], through: Sequence[Tensor]) -> None:
    """Refuse a callable whose gradient does not come through the outputs of the loss alone."""
    size = max(float(g.abs().max()) for g in whole)
    gap = max(float((a - b).abs().max()) for a, b in zip(whole, through, strict=True))
    if not gap <= torch.finfo(whole[0].dtype).eps ** 0.5 * size:
        got, fix = "a callable that looks at more than the logits", "Use parts of the logits, or select= another part."
        raise refusal("outputs", got=got, expected="a function of the outputs that the loss is of", fix=fix)

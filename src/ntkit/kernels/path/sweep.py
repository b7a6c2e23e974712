"""The backward sweep over a run: the effect of each step's gradients on the outputs of the test points.

With Phi_s the (averaged) Jacobian of the test outputs over step s and the update linear in gradients (`Update`),
sum_s Phi_s u_s is rearranged so that everything accumulates on the test side:

    Lambda_s = - buffered_s * Phi_s + carry_{s+1} Lambda_{s+1}        effect of a change of the buffer b_{s+1}
    Delta_s  = entering_s Lambda_s - direct_s Phi_s                   effect of a change of d_s
    contribution of example i at step s = gradient_s <Delta_s, J(x_i)^T slope_i>

so the memory is (test points x outputs x parameters), never (training examples x parameters).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkit.base.batch import Batch, count
from ntkit.jacobian.contraction import Tile
from ntkit.jacobian.engine import Engine, Job
from ntkit.jacobian.pairs import Whole
from ntkit.kernels.path.effects import Addition, Delta, add_all, has_buffer, multiplied, times
from ntkit.kernels.path.integration import Segment
from ntkit.kernels.path.row_gradients import along
from ntkit.trajectory.optimizer_updates import check_factors
from ntkit.trajectory.replay import ReplayStep

_SHARE = 0.15  # of the budget: for the gradients of the training examples in hand


class Weighted(nn.Module):
    """A network's outputs times given numbers, summed: [n, 1], whose gradient is J(x_i)^T slope_i."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ntkit_slope: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Sum over all outputs of a sample."""
        return (self.network(*args, **kwargs) * ntkit_slope)[..., None].flatten(1).sum(1, keepdim=True)


def prepended(first: Tensor, x: Batch, name: str) -> Batch:
    """A batch with one more tensor, before the others."""
    if isinstance(x, Tensor):
        return (first, x)
    return {name: first, **x} if isinstance(x, dict) else (first, *x)


class Sweep:
    """Contributions to the outputs of one set of test points, from the last step to the first.

    Parameters
    ----------
    segment : the test side.
    network : the network that was trained; its parameters by name are `params`.
    x : test points; `n` training examples, `outputs` outputs each.
    budget : bytes.
    layers, steps : whether to return contributions per parameter, per step.
    """

    def __init__(
        self,
        segment: Segment,
        network: nn.Module,
        params: Mapping[str, nn.Parameter],
        x: Batch,
        n: int,
        outputs: int,
        budget: int,
        layers: bool,
        steps: bool,
    ) -> None:
        self._segment, self._x = segment, x
        self._train = Engine(Weighted(network), memory=budget, selected=params)
        self._like = next(iter(params.values()))
        self._wide = segment.engine.dtype  # of gradients, where parameters have several dtypes
        m = count(x)
        options = {"dtype": torch.float64, "device": self._like.device}
        self._total = torch.zeros(n, m, outputs, **options)  # examples first: a step adds whole rows
        self.regularization = torch.zeros(m, outputs, **options)
        self._layers = {name: torch.zeros(n, m, outputs, **options) for name in params} if layers else {}
        self.steps: list[tuple[int, Tensor, Tensor]] | None = [] if steps else None
        self._buffers: dict[str, Tensor] = {}  # Lambda: parameter -> [m, C, entries]
        self._carry: dict[str, float] = {}

    @torch.no_grad()
    def step(self, step: ReplayStep) -> None:
        """Add the contributions of one more step: the one before the last one added."""
        check_factors(step.updates, step.step)
        plain = not self._buffers and not any(has_buffer(u) for u in step.updates.values())
        self._segment.at(step.before, step.after)
        values = self._plain(step) if plain else self._accumulated(step)
        total = torch.stack(list(values.values())).sum(0) if len(values) > 1 else next(iter(values.values()))
        rows = step.rows.to(self._total.device)
        self._total.index_add_(0, rows, total)
        for name, sum_ in self._layers.items():
            sum_.index_add_(0, rows, values[name])
        if self.steps is not None:
            self.steps.append((step.step, step.rows.cpu(), total.permute(1, 2, 0).cpu()))

    @property
    def contributions(self) -> Tensor:
        """Sums over the steps added so far, [m, C, n]."""
        return self._total.permute(1, 2, 0)

    @property
    def layers(self) -> dict[str, Tensor]:
        """The same per parameter; empty unless requested."""
        return {name: sum_.permute(1, 2, 0) for name, sum_ in self._layers.items()}

    def state(self, done: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The whole state of a sweep; after its last step (`done`) without the buffers."""
        tensors = {"total": self._total, "regularization": self.regularization}
        tensors |= {f"layers.{name}": value for name, value in self._layers.items()}
        for step, rows, values in self.steps or []:
            tensors |= {f"rows.{step}": rows, f"values.{step}": values}
        if not done:
            tensors |= {f"buffers.{name}": value for name, value in self._buffers.items()}
        return tensors, self._carry

    def restore(self, tensors: Mapping[str, Tensor], carry: Mapping[str, float]) -> None:
        """Set a state that `state` returned."""
        device = self._like.device
        self._total, self.regularization = (tensors[name].to(device) for name in ("total", "regularization"))
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "layers":
                self._layers[rest] = value.to(device)
            elif kind == "buffers":
                self._buffers[rest] = value.to(device)
            elif kind == "rows" and self.steps is not None:
                self.steps.append((int(rest), value, tensors[f"values.{rest}"]))
        if self.steps is not None:
            self.steps.sort(key=lambda share: -share[0])
        self._carry = dict(carry)

    # ------------------------------------------------------------------ without a buffer: no sum over steps

    def _plain(self, step: ReplayStep) -> dict[str, Tensor]:
        """Contributions of a step of plain gradient descent: products of factors, no gradient is formed."""
        x = prepended(step.slope, step.x, "ntkit_slope")

        def products(job: Job) -> tuple[dict[str, Tensor], Tensor]:
            self._segment.set(self._train_at(step))
            return self._products(step, self._train.tile(x, job.right, job.plan), job)

        contributions, decay = self._segment.engine.run(products, self._x, x, other=self._train)
        self.regularization += decay
        return contributions

    def _products(self, step: ReplayStep, train: Tile, job: Job) -> tuple[dict[str, Tensor], Tensor]:
        """Contributions [B, m, C] by parameter (under one name those of all parameters multiplied at once), decay."""
        groups: dict[float, list[str]] = {}
        for name, u in step.updates.items():
            groups.setdefault(-u.direct * u.gradient, []).append(name)
        apart = bool(self._layers) or len(groups) > 1
        contributions: dict[str, Tensor] = {}
        decay = torch.zeros_like(self.regularization)
        for weight in self._segment.places(step.before, step.after, self._x):
            test = self._segment.engine.tile(self._x, job.left, job.plan)
            for factor, names in groups.items():
                for name in names if apart else names[:1]:
                    one, other = (test.only(name), train.only(name)) if apart else (test, train)
                    product = multiplied(one, other, job.plan.scratch).transpose(0, 1).double()
                    contributions[name] = contributions.get(name, 0.0) + weight * factor * product
            for name, u in step.updates.items():
                if rate := u.direct * u.coupled:
                    decay -= weight * rate * _along(test, name, step.before[name])
        return contributions, decay

    def _train_at(self, step: ReplayStep) -> Mapping[str, Tensor]:
        """Parameters at which training gradients are taken: the step's, or the initial ones for "ntk"."""
        return self._segment.origin if self._segment.integration == "ntk" else step.before

    # ------------------------------------------------------------------ with a buffer

    def _accumulated(self, step: ReplayStep) -> dict[str, Tensor]:
        """Contributions of a step whose gradients act on later steps through a buffer."""
        direct = self._absorb(step)
        deltas: dict[str, Delta | None] = {}
        for name, u in step.updates.items():
            buffer = self._buffers.get(name)
            if name in direct:
                delta = direct.pop(name).mul_(-u.direct)
                if buffer is not None and u.entering:
                    delta.add_(buffer, alpha=u.entering)
                deltas[name] = (1.0, delta)
            else:
                deltas[name] = None if buffer is None or not u.entering else (u.entering, buffer)
        for name, u in step.updates.items():
            if u.coupled and (delta := deltas[name]) is not None:
                theta = step.before[name].reshape(-1).to(delta[1])
                self.regularization += u.coupled * delta[0] * (delta[1] @ theta).double()
        self._carry = {name: u.carry for name, u in step.updates.items()}
        contributions: dict[str, list[Tensor]] = {}
        for examples, gradients in self._train_gradients(step):
            products = times(deltas, gradients)
            for name in gradients:
                part = products.pop(name, None)
                if part is None:
                    part = self._total.new_zeros(examples, *self.regularization.shape)
                contributions.setdefault(name, []).append(part.mul_(step.updates[name].gradient))
        return {name: torch.cat(parts) for name, parts in contributions.items()}

    def _absorb(self, step: ReplayStep) -> dict[str, Tensor]:
        """Add Phi of this step to Lambda; returns Phi itself where it also acts directly."""
        m = count(self._x)
        direct: dict[str, Tensor] = {}
        carry = {name: self._carry[name] for name in self._buffers}  # once, with the first gradients
        for weight in self._segment.places(step.before, step.after, self._x):
            for part, factors in self._segment.engine.batches(self._x, _SHARE):
                sums = self.regularization[part]
                additions = []
                for name, factor in factors.items():
                    u, theta = step.updates[name], step.before[name].reshape(-1).to(self._wide)
                    for needed, own in ((has_buffer(u), self._buffers), (bool(u.direct), direct)):
                        if needed and name not in own:
                            own[name] = theta.new_zeros(m, sums.shape[1], theta.numel())
                    buffer, at_once = (
                        None if (t := own.get(name)) is None else t[part] for own in (self._buffers, direct)
                    )
                    additions.append(Addition(u, factor, buffer, carry.get(name, 1.0), at_once, theta, sums))
                add_all(additions, weight)
            carry = {}
        return direct

    def _train_gradients(self, step: ReplayStep) -> Iterator[tuple[int, dict[str, Whole]]]:
        """Some training examples of a step at a time: how many, and their gradients of one output by parameter."""
        self._segment.set(self._train_at(step))
        x = prepended(step.slope, step.x, "ntkit_slope")
        for part, factors in self._train.batches(x, _SHARE):
            yield part.stop - part.start, factors


def _along(tile: Tile, name: str, direction: Tensor) -> Tensor:
    """Products of each sample's gradient with a direction, [n, C]."""
    own, flat = tile.only(name), direction.reshape(-1)
    total: Any = 0.0
    for rows in (own.rows, *own.large.values()):
        if rows.shape[2]:
            total = total + rows @ flat.to(rows)
    for pairs in own.pairs.values():
        total = total + along(pairs, flat)
    return total.double()
